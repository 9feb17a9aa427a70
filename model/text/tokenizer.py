"""Tokenizers: byte-level BPE or one token per character, trained here and shipped as `PreTrainedTokenizerFast`.

Both encode every byte string and decode it exactly. BPE uses GPT-2's pre-tokenizer, so that other runtimes ("gpt-2" in
GGUF) split text the same way, with one addition: runs of letters, digits, spaces or other characters are cut every
`MAX_RUN_LENGTH` characters. Merging takes quadratic time in the length of a pre-token, so without the limit base64,
minified scripts and languages without spaces would dominate training and encoding. The longest run in the Python
standard library has 80 characters. `<|endoftext|>` (id 0, bos and eos) and `<|pad|>` (id 1) come first and stand for no
bytes; written out in a document they are ordinary text. `FastEncoder` gives the same ids several times faster and
encodes the corpus.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.artifact import read_json
from model.errors import PipelineError, one_line
from model.progress import Log, silent, with_lines
from model.settings import TokenizerSettings
from model.text.chat.check import check_templates
from model.text.chat.template import MARKS, add_marks

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIALS = (END_OF_TEXT, PAD)
# GPT-2's split of a text into words, as ByteLevel(use_regex=True) has it built in.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MAX_RUN_LENGTH = 256
"""Characters of one kind in one pre-token, besides the space before them."""
BOUNDED_PATTERN = GPT2_PATTERN.replace("+", f"{{1,{MAX_RUN_LENGTH}}}")
# An equivalent pattern for tiktoken's regex engine, which unrolls a bounded repeat into more states than it allows
# unless an (empty) lookaround makes it count instead. Costs a third of the speed on text without long runs.
_COUNTED_PATTERN = re.sub(r"(\\[a-zA-Z](?:\{[LN]\})?|\[[^]]+\])\+", rf"(?:\1(?=)){{1,{MAX_RUN_LENGTH}}}", GPT2_PATTERN)
# A run longer than MAX_RUN_LENGTH covers at least one aligned block of half that length. The listed separators end
# every run of word characters, and their category is the same in every version of Unicode.
_BLOCK = MAX_RUN_LENGTH // 2
_ONE_KIND = re.compile(rf"[^ \t\n\r\u3000\u3001\u3002\uff0c]{{{_BLOCK}}}|[\W_]{{{_BLOCK}}}")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
PIECE_CHARACTERS = 65_536

Ids = npt.NDArray[np.uint32]


def train_tokenizer(settings: TokenizerSettings, texts: Iterable[str], *, log: Log = silent) -> PreTrainedTokenizerFast:
    """Train on `texts`: merges up to vocab_size for "bpe", the characters that occur for "char" (vocab_size unused).

    "pretrained" takes the tokenizer of the checkpoint in `settings.path` as it is. With `settings.chat` it carries the
    chat template of `model/text/chat/template.py` and its marks: the first ids after the other special tokens, or the
    last ones of a pretrained tokenizer.
    Raises PipelineError if the texts do not hold enough pairs that occur twice to reach vocab_size, or the pretrained
    tokenizer is of another kind.
    """
    made = _pretrained(Path(settings.path)) if settings.kind == "pretrained" else _train(settings, texts, log)
    if settings.chat:
        add_marks(made)
    return made


def _pretrained(directory: Path) -> PreTrainedTokenizerFast:
    if not (directory / "tokenizer.json").is_file():
        raise PipelineError(
            f"tokenizer.path is {str(directory)!r}: no tokenizer.json there; name a checkpoint's folder"
        )
    try:
        made = load_tokenizer(directory)
    except PipelineError as error:
        raise PipelineError(f"tokenizer.path is {str(directory)!r}: {error}") from None
    state = json.loads(made.backend_tokenizer.to_str())
    model, decoder = state["model"], state["decoder"] or {}
    is_byte_level = model["type"] == "BPE" and '"ByteLevel"' in json.dumps(decoder)
    is_ours = model.get("byte_fallback") and not (model["merges"] or state["normalizer"] or state["pre_tokenizer"])
    if not (is_byte_level or is_ours):
        kind = "BPE of characters" if model["type"] == "BPE" else model["type"]
        raise PipelineError(
            f"tokenizer.path is {str(directory)!r}: its tokenizer is {kind}: expected byte-level BPE, as GPT-2, "
            "Llama 3 and Qwen have it, or one of this project; take another model"
        )
    return made


def _train(settings: TokenizerSettings, texts: Iterable[str], log: Log) -> PreTrainedTokenizerFast:
    specials = [*SPECIALS, *(MARKS.values() if settings.chat else ())]
    is_bpe = settings.kind == "bpe"
    tokenizer = _train_bpe(settings.vocab_size, specials, texts, log) if is_bpe else _characters(specials, texts)
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.sequence_length,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer that `save_pretrained` wrote.

    Raises PipelineError if there is none, or one of its files is damaged, which it names.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise PipelineError(f"no tokenizer.json in {directory}: expected a saved tokenizer; make the dataset again")
    state = read_json(path, _AGAIN)
    others = [directory / name for name in _BESIDE if (directory / name).is_file()]
    for other in others:
        read_json(other, _AGAIN)
    _check_template(directory / "chat_template.jinja")
    with _as_pipeline_error(f"{path} is not a tokenizer", "expected one in the format of the library tokenizers"):
        model = state["model"]
        if isinstance(model, dict) and model.get("merges") and model.get("continuing_subword_prefix"):
            # The library would cut each merge by its length, and abort the process where one is shorter.
            raise ValueError(f"continuing_subword_prefix is {model['continuing_subword_prefix']!r}, not null")
        bare = Tokenizer.from_file(str(path))
    named = " or ".join(map(str, others)) or path
    with _as_pipeline_error(f"{named} does not fit {path.name}", "expected the files that save_pretrained wrote"):
        loaded = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    if loaded.eos_token is None or bare.token_to_id(loaded.eos_token) is None:
        raise PipelineError(
            f"{directory / _BESIDE[0]} has eos_token {loaded.eos_token!r}: expected the token of {path.name} that ends "
            "a text; name it there, or take another model"
        )
    check_templates(loaded, directory)
    return loaded


_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_AGAIN = "make the dataset again, or fetch the model again"


@contextmanager
def _as_pipeline_error(found: str, expected: str) -> Iterator[None]:
    """Any error of the libraries as one line: they check few types, and what is wrong fails in many ways."""
    try:
        yield
    except BaseException as error:
        # Errors of tokenizers' Rust code do not derive from Exception; interrupts do not either, and pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PipelineError(f"{found} ({one_line(error)}): {expected}; {_AGAIN}") from None


def _check_template(path: Path) -> None:
    if not path.is_file():
        return
    try:
        path.read_text(encoding="utf-8")
    except ValueError as error:
        raise PipelineError(f"{path} is not UTF-8 ({error}): expected a chat template in Jinja; {_AGAIN}") from None


def splits_as_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` takes text as it is and splits it as GPT-2 does, with or without the bound on a run."""
    state = json.loads(tokenizer.to_str())
    return state["normalizer"] is None and (_bounds_runs(state) or _is_gpt2(state["pre_tokenizer"], use_regex=True))


def without_bound(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that splits as GPT-2 does, without the bound on a run; of another, a plain copy."""
    state = json.loads(tokenizer.to_str())
    if _bounds_runs(state):
        state["pre_tokenizer"] = {**state["pre_tokenizer"]["pretokenizers"][1], "use_regex": True}
    return Tokenizer.from_str(json.dumps(state))


def _bounds_runs(state: dict[str, Any]) -> bool:
    parts = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    bounded = {"type": "Split", "pattern": {"Regex": BOUNDED_PATTERN}, "behavior": "Isolated", "invert": False}
    return len(parts) == 2 and parts[0] == bounded and _is_gpt2(parts[1], use_regex=False)


def _is_gpt2(pre_tokenizer: dict[str, Any] | None, *, use_regex: bool) -> bool:
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
    return expected.items() <= (pre_tokenizer or {}).items()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The text bytes of each token, indexed by id; empty for special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    to_bytes = _character_token_bytes if _is_character_level(tokenizer) else _byte_level_token_bytes
    return [b"" if number in special else to_bytes(token) for number, token in enumerate(tokens)]


def even_sample(texts: Iterable[str], total_bytes: int, wanted_bytes: int) -> Iterator[str]:
    """Pieces of `texts` spread evenly over their total_bytes, at most wanted_bytes together (0: everything)."""
    if wanted_bytes == 0 or wanted_bytes >= total_bytes:
        yield from texts
        return
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            size = len(piece.encode())
            if taken * total_bytes <= seen * wanted_bytes:
                if taken + size > wanted_bytes:
                    piece = piece.encode()[: wanted_bytes - taken].decode(errors="ignore")
                yield piece
                taken += size
                if taken >= wanted_bytes:
                    return
            seen += size


class FastEncoder:
    """Encodes text with a trained tokenizer's own ids, faster than the tokenizer does; safe to call from threads.

    Special tokens written out in the text are encoded as ordinary text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._token_bytes = token_bytes(tokenizer)
        self._specials = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # A copy, because encode_special_tokens is a property of the object.
        self._reference = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._reference.encode_special_tokens = True
        # Of two tokens for one byte ("A" and "<0x41>" at character level) the byte token comes first.
        single = {data: number for number, data in reversed(list(enumerate(self._token_bytes))) if len(data) == 1}
        self._byte_ids = np.array([single[bytes([byte])] for byte in range(256)], np.uint32)
        self.encode: Callable[[str], Ids]
        """Ids of one text, shape (tokens,); the text must be encodable as UTF-8."""
        if _is_character_level(tokenizer):
            self._character_ids = _character_table(self._reference)
            self.encode = self._encode_characters
        elif splits_as_gpt2(self._reference) and _merges_reach_every_token(self._reference, self._specials):
            self._tiktoken = self._build_tiktoken(GPT2_PATTERN)
            # Tokenizers trained before the limit existed lack it.
            is_bounded = _bounds_runs(json.loads(self._reference.to_str()))
            self._bounded = self._build_tiktoken(_COUNTED_PATTERN) if is_bounded else None
            self.encode = self._encode_tiktoken
        else:
            self.encode = self._encode_reference

    def encode_bytes(self, data: bytes) -> Ids:
        """Ids of any byte string, shape (tokens,); bytes that are not UTF-8 become one token each."""
        parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
        ids = [
            self._byte_ids[np.frombuffer(part.encode("utf-8", "surrogateescape"), np.uint8)]
            if n % 2
            else self.encode(part)
            for n, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def _build_tiktoken(self, pattern: str) -> tiktoken.Encoding:
        # Ids equal ranks, since the trainer numbers merges in the order in which it finds them.
        specials = set(self._specials.values())
        ranks = {data: number for number, data in enumerate(self._token_bytes) if number not in specials}
        return tiktoken.Encoding("trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._specials)

    def _encode_tiktoken(self, text: str) -> Ids:
        if _may_hold_a_long_run(text):
            # Without the limit tiktoken's regex engine fails on a run of several 100,000 spaces.
            return (
                self._bounded.encode_to_numpy(text, disallowed_special=())
                if self._bounded
                else self._encode_reference(text)
            )
        return self._tiktoken.encode_to_numpy(text, disallowed_special=())

    def _encode_reference(self, text: str) -> Ids:
        return np.array(self._reference.encode(text, add_special_tokens=False).ids, np.uint32)

    def _encode_characters(self, text: str) -> Ids:
        ids = self._character_ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        unknown = ids < 0
        if not unknown.any():
            return ids.astype(np.uint32)
        characters = [character for character, is_unknown in zip(text, unknown, strict=True) if is_unknown]
        lengths = np.ones(len(ids), np.int64)
        lengths[unknown] = [len(character.encode()) for character in characters]
        is_byte = np.repeat(unknown, lengths)
        encoded = np.empty(len(is_byte), np.uint32)
        encoded[is_byte] = self._byte_ids[np.frombuffer("".join(characters).encode(), np.uint8)]
        encoded[~is_byte] = ids[~unknown]
        return encoded


def _may_hold_a_long_run(text: str) -> bool:
    return any(_ONE_KIND.match(text, start) for start in range(0, len(text), _BLOCK))


def _train_bpe(vocab_size: int, specials: list[str], texts: Iterable[str], log: Log) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BOUNDED_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with_lines(lambda: tokenizer.train_from_iterator(texts, trainer), log, f"tokenizer: learning {vocab_size:,} tokens")
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise PipelineError(
            f"tokenizer.vocab_size is {vocab_size:,}, but the training text only gives {reached:,} tokens (pairs that "
            f"occur twice ran out): set it to {reached} or less, or add text"
        )
    return tokenizer


def _characters(specials: list[str], texts: Iterable[str]) -> Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(characters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _is_character_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    return bool(tokenizer.backend_tokenizer.model.byte_fallback)


def _character_table(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Id of every code point, -1 where the vocabulary lacks it; shape (0x110000,)."""
    table = np.full(0x110000, -1, np.int32)
    for token, number in tokenizer.get_vocab().items():
        if len(token) == 1:
            table[ord(token)] = number
    return table


def _merges_reach_every_token(tokenizer: Tokenizer, specials: dict[str, int]) -> bool:
    """Whether merging each token's own bytes gives that token: then lookup by rank equals lookup by merge rule.

    Proof: tiktoken merges a neighboring pair whenever the joined bytes are a token; the tokenizer only where a rule
    names the pair. Tokens are never split, so when two neighbors l, r cover a token t's bytes, the merges inside that
    span are those of t alone, which pass through two parts only once, just before t. Hence (l, r) is that rule.
    """
    bare = Tokenizer(tokenizer.model)
    tokens = [(token, number) for token, number in tokenizer.get_vocab().items() if token not in specials]
    encodings = bare.encode_batch([token for token, _ in tokens])
    return all(encoding.ids == [number] for encoding, (_, number) in zip(encodings, tokens, strict=True))


def _unicode_of_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next free character from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _unicode_of_bytes()


def _byte_level_token_bytes(token: str) -> bytes:
    if not _BYTES.keys() >= set(token):
        return token.encode()  # added to the vocabulary as a plain text, which the decoder takes as it is
    return bytes(_BYTES[character] for character in token)


def _character_token_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.encode()
