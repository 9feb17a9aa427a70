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
        return self.push_all((token_id,))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The same of several tokens."""
        known = self._token_bytes
        return self._decoder.decode(b"".join([known[token] for token in token_ids if token < len(known)]))

    def flush(self) -> str:
        """Text at the end: U+FFFD if a character is incomplete, else empty."""
        return self._decoder.decode(b"", final=True)
