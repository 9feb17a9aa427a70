"""Grammars that constrain generated text: JSON schemas, regular expressions, Lark and GBNF grammars, compiled by
llguidance (Moskal, Nori and others, https://github.com/guidance-ai/llguidance: Earley's parser over derivatives of
regular expressions, walked along a trie of the vocabulary).

A compiled `Grammar` is shared; each text has its own `Matcher`. Compilation and matching are bounded by work, not by
time, so a grammar is accepted or refused alike on every machine. The package is imported with the first grammar. The
server's request format for grammars is not here.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.errors import PipelineError
from model.generation.grammar.finite import check_lark, check_schema, check_terminals
from model.generation.grammar.supported import supported, supported_in_lark

Kind = Literal["json", "regex", "grammar", "calls"]
MAX_WHITE_SPACE = 20
"""Most consecutive whitespace characters in a JSON text: without a bound a model may emit whitespace until its tokens
run out."""
MAX_REASON_LENGTH = 200
KEPT_GRAMMARS = 32
JSON_OPTIONS: Any = {
    "whitespace_pattern": rf"[ \n\r\t]{{0,{MAX_WHITE_SPACE}}}",
    "lenient": False,
    "coerce_one_of": False,
}
LIMITS: dict[str, Any] = {
    "max_lexer_states": 20_000,  # of 1 to 2 KB
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# A row of an ambiguous grammar costs its items squared and delays every other text: 300 items take about 15 ms. Rows of
# JSON are long (four items per property) but unambiguous.
MAX_ITEMS = {"json": 2000, "calls": 2000, "regex": 300, "grammar": 300}

NO_TOKEN = "NoExtension"
"""Word in the error of llguidance for a place without an allowed token."""
DEAD_END = "the grammar allows no token at this place, where the text may not end: correct the grammar"


class GrammarFailure(Exception):
    """A grammar gives no next token, in one line: it takes more work than the limit per text, or allows none."""


class Grammar:
    """A compiled grammar. vocab_size: of the model, which may have more ids than the tokenizer. end_of_text_ids: tokens
    allowed wherever a text may end.
    """

    def __init__(self, template: Any, vocab_size: int, end_of_text_ids: Sequence[int]) -> None:
        self._template, self._vocab_size = template, vocab_size
        self.end_of_text_ids = tuple(end_of_text_ids)

    def matcher(self) -> "Matcher":
        """A matcher at the beginning of a text; takes microseconds."""
        return Matcher(self._template.deep_copy(), self._vocab_size)


class Matcher:
    """State of one text in its grammar."""

    def __init__(self, state: Any, vocab_size: int) -> None:
        self._state, self._vocab_size = state, vocab_size

    @property
    def is_complete(self) -> bool:
        """Whether the text follows the grammar and nothing can be added to it."""
        return bool(self._state.is_stopped()) and not self._state.is_error()

    @property
    def may_end(self) -> bool:
        """Whether the text follows the grammar as it is."""
        return bool(self._state.is_accepting())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Mask of the tokens that may come next, shape (V,); includes the end-of-text tokens if the text may end.

        Raises GrammarFailure.
        """
        mask = self._state.compute_bitmask()
        self._check()
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        """Advance by an allowed token. Raises GrammarFailure."""
        self._state.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._state.is_error():
            raise _failure(one_line(self._state.get_error()))


class GrammarCompiler:
    """Compiles grammars for one vocabulary; safe to call from any thread.

    token_bytes: the bytes of each id. special_ids: tokens that are not text. end_of_text_ids: tokens that end a
    text. encode: tokens of a byte string.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        special_ids: Sequence[int],
        end_of_text_ids: Sequence[int],
        vocab_size: int,
        encode: Callable[[bytes], list[int]],
    ) -> None:
        self.tokens, self.special_token_ids = list(token_bytes), list(special_ids)
        self.bos_token_id = self.eos_token_id = end_of_text_ids[0]
        self._end_of_text_ids, self._vocab_size, self._encode = list(end_of_text_ids), vocab_size, encode
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._kept: OrderedDict[tuple[Kind, str], Grammar] = OrderedDict()

    def __call__(self, data: bytes) -> list[int]:
        """The call that llguidance's tokenizer wrapper makes."""
        return self._encode(data)

    def compile(self, kind: Kind, source: str) -> Grammar:
        """Compile a grammar: JSON that is valid under a schema, full matches of a regular expression (Rust's syntax),
        or derivations of a grammar from `start` (Lark) or `root` (GBNF, recognized by its ::=). "calls": a Lark grammar
        that the server builds from a client's JSON schemas.

        Raises PipelineError for an invalid grammar and for a schema with a keyword that cannot be enforced. Large
        grammars take about 100 ms, during which other threads run.
        """
        if found := self.kept(kind, source):
            return found
        grammar = Grammar(self._template(kind, source), self._vocab_size, self._end_of_text_ids)
        with self._lock:
            self._kept[kind, source] = grammar
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def kept(self, kind: Kind, source: str) -> Grammar | None:
        """The grammar if it is in the cache, else None."""
        with self._lock:
            if found := self._kept.get((kind, source)):
                self._kept.move_to_end((kind, source))
            return found

    def _template(self, kind: Kind, source: str) -> Any:
        import llguidance

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(self), n_vocab=self._vocab_size, eos_token=self._end_of_text_ids
                )
        limits = llguidance.LLParserLimits(**LIMITS, max_items_in_row=MAX_ITEMS[kind])
        try:
            translated = _translate(kind, source)
            template = llguidance.LLMatcher(self._tokenizer, translated, log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise PipelineError(one_line(str(error)) or "it is nested too deep") from None
        if template.is_error():
            raise PipelineError(one_line(template.get_error()))
        first = template.deep_copy()
        first.compute_bitmask()  # computes the first token's mask here rather than between two steps
        if first.is_error():
            raise PipelineError("no text follows it")
        if kind == "grammar":
            check_terminals(translated, partial(self._matches_nothing, limits))
        return template

    def _matches_nothing(self, limits: Any, source: str) -> bool:
        """Whether no text matches a Lark grammar; False if that is not known."""
        import llguidance

        grammar = str(llguidance.grammar_from("lark", source))
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            return False
        matcher.compute_bitmask()
        return bool(matcher.is_error()) and NO_TOKEN in matcher.get_error()


def choice_grammar(choices: Sequence[str]) -> str:
    """A Lark grammar that matches one of some texts.

    They are one terminal: each alternative of a rule would be an item of a row, whose number is bounded.
    """
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def one_line(message: str) -> str:
    """The reason in an error of llguidance, whose text quotes the grammar over several lines."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join((reasons or lines)[0].split())[:MAX_REASON_LENGTH]


def _failure(reason: str) -> GrammarFailure:
    if NO_TOKEN in reason:
        return GrammarFailure(DEAD_END)
    return GrammarFailure(f"the grammar takes too much work for the next token of this text ({reason}): simplify it")


def _translate(kind: Kind, source: str) -> str:
    """A grammar in the form of llguidance. Raises ValueError, and PipelineError for one that no finite text matches."""
    import llguidance

    if kind == "json":
        check_schema(source)
        return str(llguidance.LLMatcher.grammar_from_json_schema(supported(source), overrides=JSON_OPTIONS))
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(source))
    is_gbnf = kind == "grammar" and "::=" in source
    translated = str(llguidance.grammar_from("gbnf" if is_gbnf else "lark", source))
    check_lark(translated)
    return translated if is_gbnf else supported_in_lark(translated)
