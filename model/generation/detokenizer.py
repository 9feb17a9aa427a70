"""Incremental detokenization: emits only complete characters.

Tokens of a byte-level vocabulary represent bytes, so one character can take several. Bytes that are not UTF-8 become
U+FFFD exactly as in `bytes.decode("utf-8", "replace")`: the joined pieces equal the decoding of the whole.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Text of one generation.

    token_bytes: the bytes of each id (`model.text.tokenizer.token_bytes`); ids beyond it, the padding of a vocabulary,
    have no bytes.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; bytes of an incomplete one are kept for the next call."""
        data = self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Text at the end: U+FFFD if a character is incomplete, else empty."""
        return self._decoder.decode(b"", final=True)
