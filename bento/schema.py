"""Bodies of requests and answers: what the OpenAPI document shows and what is checked before anything runs.

A field is supported exactly or refused: types are strict, unknown fields and numbers that are not finite are errors.
Limits that depend on the model (tokens that fit into its context) are checked in `api.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.generation.requests import MAX_SEED, SamplingParameters

DEFAULT_MAX_TOKENS = 128
LARGEST_COUNT = 2**31 - 1

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateRequest(_Request):
    """Text to continue, and how."""

    prompt: str = Field(min_length=1, description="The text to continue.", examples=["def main():\n"])
    max_tokens: Count | None = Field(
        None,
        description=f"Most tokens to generate. Default: {DEFAULT_MAX_TOKENS}, or what fits after the prompt if less.",
    )
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the most likely token each time.")
    top_k: int = Field(0, ge=0, le=LARGEST_COUNT, description="Draw from the k most likely tokens; 0 keeps all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the most likely tokens that hold this probability together."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, description="Above 1 makes tokens that occurred less likely; 1 changes nothing."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same text.")
    stream: bool = Field(False, description="Answer with server-sent events, one for each piece of text.")

    def sampling(self) -> SamplingParameters:
        """The engine's form of these fields."""
        return SamplingParameters(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class GenerateTextRequest(_Request):
    """A text to continue by a number of tokens; `context` is put before the prompt, on a line of its own."""

    prompt: str = Field(min_length=1, description="The text to continue.")
    context: str | None = Field(None, description="Text before the prompt, separated from it by a newline.")
    num_of_token_generated: Count = Field(description="Tokens to generate; fewer only where the text ends before.")

    def text(self) -> str:
        """What the model continues."""
        return f"{self.context}\n{self.prompt}" if self.context else self.prompt


class GenerateTextWithoutPromptRequest(_Request):
    """A number of tokens from the beginning of a new text."""

    num_of_token_generated: Count = Field(description="Tokens to generate; fewer only where the text ends before.")


class Usage(BaseModel):
    """Tokens of one request. The end-of-text token counts where the text ended with it."""

    prompt_tokens: int
    generated_tokens: int
    total_tokens: int


class GenerateResponse(BaseModel):
    """The text after the prompt. finish_reason: "stop" (the text ended), "length" (max_tokens were generated)."""

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    model: str


class GenerateTextResponse(BaseModel):
    """The text after the prompt."""

    generated_text: str


class ErrorDetail(BaseModel):
    """What was wrong, in one line; `param` names the field where one was."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer of status 400 and above."""

    error: ErrorDetail
