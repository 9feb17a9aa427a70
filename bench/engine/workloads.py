"""The workloads that every contender runs, as methods of `Contender`, with model shapes and prompts."""

import math
import random

from transformers import PreTrainedTokenizerFast

from bench.settings import read_settings
from model.build import build_config, build_model
from model.generation.requests import SamplingParameters
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings, TokenizerSettings
from model.text.tokenizer import train_tokenizer

RAGGED_STREAMS, RAGGED_REQUESTS = 16, 48
CONTEXT = 2_048
SAMPLED = SamplingParameters(temperature=0.8, top_k=40, top_p=0.95, seed=0)
"""llama.cpp's own defaults."""
SHAPES: dict[str, tuple[ModelSettings, int]] = {
    "2m": (
        ModelSettings(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
        ),
        4_096,
    ),
    "30m": (read_settings(ModelSettings, "model/rex_30m.yaml"), 16_384),
    "125m": (
        ModelSettings(
            hidden_size=768,
            intermediate_size=2_048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=CONTEXT,
        ),
        32_768,
    ),
}
"""Settings and vocabulary of the models with random weights, which do not change the speed. "30m" has the shape of the
experiment `stdlib_30m`."""


def model_of(shape: str) -> RexForCausalLM:
    """A model of SHAPES with random weights."""
    settings, vocab_size = SHAPES[shape]
    return build_model(build_config(settings, vocab_size, 0, 0, 1), seed=0).eval().requires_grad_(False)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for engines that require one to turn tokens into text; its vocabulary is smaller than the models'."""
    return train_tokenizer(TokenizerSettings(vocab_size=260), ["def main():\n    return 0\n"] * 4)


class Contender:
    """One way to generate; each workload is a method that runs it once and returns tokens per second.

    Decoding workloads count from each stream's first token to its last, without the prompt; the ragged ones divide
    answer tokens by the total time. All ignore end-of-text, and all but those named sampled are greedy.
    """

    def __init__(self, model: RexForCausalLM) -> None:
        self._model, self._vocab_size = model, model.config.vocab_size
        self._round = 0
        self._is_sampled = False
        self.requests = RAGGED_REQUESTS
        """Number of requests of the ragged workloads."""
        numbers = random.Random(0)
        self._prompt_tokens = [numbers.randint(448, 576) for _ in range(RAGGED_REQUESTS)]
        # Quantiles of the distributions instead of samples, so that raggedness does not depend on a seed.
        quantiles = [(i + 0.5) / RAGGED_REQUESTS for i in range(RAGGED_REQUESTS)]
        self._even_answers = [round(32 + 96 * quantile) for quantile in quantiles]
        numbers.shuffle(self._even_answers)
        self._long_tailed_answers = [max(8, round(-80 * math.log(1 - quantile))) for quantile in quantiles]
        numbers.shuffle(self._long_tailed_answers)

    def _prompts(self, lengths: list[int]) -> list[list[int]]:
        """Prompts new in each round, so that a prefix cache cannot help."""
        self._round += 1
        return [self._prompt(length, 1000 * self._round + i) for i, length in enumerate(lengths)]

    def _prompt(self, tokens: int, seed: int) -> list[int]:
        numbers = random.Random(seed)
        return [numbers.randrange(2, self._vocab_size) for _ in range(tokens)]

    def one_stream(self) -> float:
        """A single stream up to 128 tokens, prompt and answer together."""
        return self.decode(1, 32, 96)

    def one_long_stream(self) -> float:
        """A single stream up to 1,024 tokens."""
        return self.decode(1, 928, 96)

    def eight_streams(self) -> float:
        """Eight equal streams up to 128 tokens."""
        return self.decode(8, 32, 96)

    def one_sampled_stream(self) -> float:
        """A single stream up to 128 tokens, sampled as SAMPLED says."""
        return self._sampled(1)

    def eight_sampled_streams(self) -> float:
        """Eight equal streams up to 128 tokens, sampled as SAMPLED says."""
        return self._sampled(8)

    def _sampled(self, streams: int) -> float:
        self._is_sampled = True
        try:
            return self.decode(streams, 32, 96)
        finally:
            self._is_sampled = False

    def prefill(self) -> float:
        """Tokens of a prompt of 900 over the time to its answer's first token."""
        raise NotImplementedError

    def ragged_even(self) -> float:
        """Sixteen ragged streams with even answers."""
        return self._ragged(self._even_answers[: self.requests])

    def ragged_long_tailed(self) -> float:
        """Sixteen ragged streams with long-tailed answers."""
        return self._ragged(self._long_tailed_answers[: self.requests])

    def from_one_token(self, streams: int, tokens: int) -> float:
        """Equal streams, each up to `tokens` tokens, from a prompt of one token."""
        return self.decode(streams, 1, max(2, tokens - 1))

    def decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Equal streams; prompts of at least one token, answers of at least two."""
        raise NotImplementedError

    def _ragged(self, answer_tokens: list[int]) -> float:
        raise NotImplementedError
