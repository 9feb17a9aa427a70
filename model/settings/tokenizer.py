"""The vocabulary and the length of a training window (`configs/tokenizer/`)."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, expect, option

_MIN_BPE_VOCABULARY = 258
_MARKS = 4


@dataclass
class TokenizerSettings(Settings, group="tokenizer"):
    """The vocabulary and the length of a training window (`configs/tokenizer/`)."""

    kind: Literal["bpe", "char", "pretrained"] = option(
        "bpe",
        "bpe: byte-level BPE; char: every character of the train split, others as bytes; pretrained: that of `path`.",
    )
    path: str = option("", "Checkpoint whose tokenizer is used (kind pretrained): its folder, or latest:EXPERIMENT.")
    chat: bool = option(
        False,
        "Documents are conversations (corpus.messages_field, corpus.response_field): the tokenizer gets a special "
        "token for each role, and a chat template.",
    )
    vocab_size: int = option(
        4096,
        "Tokens, special ones included; kind char derives it from the text.",
        unit="tokens",
        above=0,
        maximum=2**20,
    )
    training_bytes: int = option(
        33_554_432,
        "Text of the train split from which merges are learned; 0: all of it.",
        unit="bytes",
        minimum=0,
        maximum=10**11,
    )
    sequence_length: int = option(
        1024,
        "Tokens in one training window; at most model.max_position_embeddings.",
        unit="tokens",
        minimum=8,
        maximum=2**20,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "bpe":
            least = _MIN_BPE_VOCABULARY + (_MARKS if self.chat else 0)
            special = f"at least {least} (256 bytes, {least - 256} specials) for kind bpe"
            expect(self.vocab_size >= least, "tokenizer.vocab_size", self.vocab_size, special)
        if self.kind == "pretrained":
            expect(bool(self.path), "tokenizer.path", self.path, "a checkpoint's folder for kind 'pretrained'")
