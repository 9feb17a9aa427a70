"""Tokenized datasets of texts in memory, in the layout that training reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from model.text.tokenizer import FastEncoder, token_bytes
from model.text.tokens import encode_split


def write_dataset(directory: Path, tokenizer: PreTrainedTokenizerFast, splits: Mapping[str, Sequence[str]]) -> Path:
    """Write the documents of each split; the directory. Ids have 16 bits, as nanoGPT's have."""
    bytes_of_tokens = token_bytes(tokenizer)
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory / "tokenizer")
    np.save(directory / "token_bytes.npy", np.frombuffer(b"".join(bytes_of_tokens), np.uint8))
    np.save(directory / "byte_counts.npy", np.array([len(data) for data in bytes_of_tokens], np.int64))
    encoder, vocab_size = FastEncoder(tokenizer), len(bytes_of_tokens)
    for split, texts in splits.items():
        encode_split(encoder, texts, directory / split, tokenizer.eos_token_id, vocab_size, np.uint16)
    return directory
