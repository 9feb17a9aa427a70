"""Structured output: request fields that constrain the text, and their conversion to a grammar.

OpenAI's `response_format`, and vLLM's `structured_outputs` and earlier `guided_*`. The text matches, or is a prefix of
a match if its tokens ran out (finish_reason "length"). A schema, an expression or a grammar that cannot be enforced
exactly is refused. Grammars are compiled off the event loop; `model/generation/grammar/grammar.py` has the bounds.
"""

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from bento.errors import ApiError
from bento.http.body import parse
from bento.schema import OnlyFalse, StrictRequest, forms
from bento.serving.backend import Backend
from model.errors import PipelineError
from model.generation.grammar.grammar import Grammar, Kind, choice_grammar

MAX_GRAMMAR_LENGTH = 65_536
MAX_ALTERNATIVES = 1024
ANY, ANY_OBJECT = "{}", '{"type": "object"}'


def _schema(value: Any) -> str:
    """A JSON schema, given as an object or as a JSON string, as JSON text."""
    if isinstance(value, str):
        try:
            value = parse(value.encode())  # within the bounds of a body
        except ApiError as error:
            reason = error.content["error"]["message"].replace("the body", "the string")
            raise PydanticCustomError("json_schema", f"{reason}: expected a JSON schema") from None
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("json_schema", "expected a JSON schema: an object")
    return json.dumps({} if value is True else value, ensure_ascii=False)


_SCHEMA = {"type": "object", "additionalProperties": True}
Schema = Annotated[Any, AfterValidator(_schema), forms(_SCHEMA, {"type": "boolean"}, {"type": "string"})]
Source = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_LENGTH)]
Choices = Annotated[list[str], Field(max_length=MAX_ALTERNATIVES)]


class NamedSchema(StrictRequest):
    """A JSON schema in OpenAI's form. It is enforced regardless of `strict`."""

    name: str | None = Field(None, max_length=256, description="Accepted and ignored.")
    description: str | None = Field(None, description="Accepted and ignored.")
    json_schema: Schema = Field(alias="schema", description="The schema of the text.")
    strict: bool | None = Field(None, description="Accepted and ignored: a schema is always enforced.")


class ResponseFormat(StrictRequest):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text: any; json_object: a JSON object; json_schema: JSON that is valid under a schema."
    )
    named: NamedSchema | None = Field(None, alias="json_schema", description="With the type json_schema.")
    plain: Schema | None = Field(
        None, alias="schema", description="A schema without a name, as llama.cpp has it: with both types of JSON."
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ResponseFormat":
        if self.type == "json_schema":
            is_right = (self.named is None) != (self.plain is None)
        else:
            is_right = self.named is None and (self.plain is None or self.type == "json_object")
        if not is_right:
            raise PydanticCustomError(
                "response_format",
                "expected the field json_schema with the type json_schema, and only then",
                {"param": "response_format"},
            )
        return self

    def source(self) -> str:
        """The schema, as JSON text."""
        if self.named:
            return self.named.json_schema
        return self.plain if self.plain and (self.plain != ANY or self.type == "json_schema") else ANY_OBJECT


class StructuredOutputs(StrictRequest):
    """vLLM's form: one of these."""

    json_schema: Schema | None = Field(None, alias="json", description="JSON that is valid under this schema.")
    regex: Source | None = Field(None, description="A text that this regular expression matches as a whole.")
    choice: Choices | None = Field(None, description="One of these texts.")
    grammar: Source | None = Field(None, description="A text of this grammar: Lark, or GBNF, which has ::=.")
    json_object: bool | None = Field(None, description="A JSON object.")
    disable_fallback: bool | None = Field(None, description="Accepted and ignored: there is none.")
    disable_any_whitespace: OnlyFalse | None = Field(None, description="Not supported: only null, false.")
    disable_additional_properties: OnlyFalse | None = Field(None, description="Not supported: only null, false.")

    def sources(self) -> Iterator[tuple[Kind, str]]:
        """The grammars of a request."""
        if self.json_schema is not None:
            yield "json", self.json_schema
        if self.regex is not None:
            yield "regex", self.regex
        if self.choice:
            yield "grammar", choice_grammar(self.choice)
        if self.grammar is not None:
            yield "grammar", self.grammar
        if self.json_object:
            yield "json", ANY_OBJECT


class Structured(StrictRequest):
    """Fields of both generating routes of the OpenAI API; at most one of them may constrain the text."""

    response_format: ResponseFormat | None = Field(None, description="The form of the text. Default: any.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The form of the text, in vLLM's format.")
    guided_json: Schema | None = Field(None, description="JSON that is valid under this schema.")
    guided_regex: Source | None = Field(
        None, description="A text that this regular expression (Rust's syntax) matches as a whole."
    )
    guided_choice: Choices | None = Field(None, description="One of these texts.")
    guided_grammar: Source | None = Field(None, description="A text of this grammar: Lark, or GBNF, which has ::=.")

    @model_validator(mode="after")
    def _check_one_form(self) -> "Structured":
        fields = [field for field, _, _ in self.forms()]
        if len(fields) > 1:
            field = fields[1]
            raise PydanticCustomError("one_form", "a text has one form: a second one is requested", {"param": field})
        return self

    def forms(self) -> list[tuple[str, Kind, str]]:
        """Field, kind and source of each requested grammar."""
        asked: list[tuple[str, Kind, str]] = []
        if self.response_format and self.response_format.type != "text":
            asked.append(("response_format", "json", self.response_format.source()))
        if self.structured_outputs:
            asked += [("structured_outputs", kind, source) for kind, source in self.structured_outputs.sources()]
        if self.guided_json is not None:
            asked.append(("guided_json", "json", self.guided_json))
        if self.guided_regex is not None:
            asked.append(("guided_regex", "regex", self.guided_regex))
        if self.guided_choice:
            asked.append(("guided_choice", "grammar", choice_grammar(self.guided_choice)))
        if self.guided_grammar is not None:
            asked.append(("guided_grammar", "grammar", self.guided_grammar))
        return asked


async def compile_form(
    backend: Backend, body: Structured, names: Mapping[str, str] = MappingProxyType({})
) -> Grammar | None:
    """The grammar of a request, None without one. names: another API's names for the fields.

    Raises ApiError 400 for a form that is wrong.
    """
    for field, kind, source in body.forms():
        return await compile_grammar(backend, names.get(field, field), kind, source)
    return None


async def compile_grammar(backend: Backend, field: str, kind: Kind, source: str, place: str = "") -> Grammar:
    """The grammar of a field. place: where it stands. Raises ApiError 400 for one that cannot be enforced."""
    if len(source) > MAX_GRAMMAR_LENGTH:
        raise _refusal(field, place, f"it has {len(source):,} characters: at most {MAX_GRAMMAR_LENGTH:,}")
    engine = backend.engine
    try:
        if found := engine.compiled_grammar(kind, source):
            return found
        # GBNF is translated in Python, which holds the GIL; the rest releases it.
        return await backend.heavy.run(engine.compile_grammar, kind, source, holds_lock=kind == "grammar")
    except PipelineError as error:
        raise _refusal(field, place, str(error)) from None


def _refusal(field: str, place: str, reason: str) -> ApiError:
    return ApiError(400, f"{place or field} cannot be enforced: {reason}", code="invalid_grammar", param=field)
