"""From tokens to text as they come, never half a character.

Tokens of a byte-level vocabulary stand for bytes, so one character can take several. Bytes that are no UTF-8 become
U+FFFD exactly as in `bytes.decode("utf-8", "replace")`: the pieces joined are the decoding of the whole.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Text of one generation.

    token_bytes: the bytes each id stands for (`model.text.tokenizer.token_bytes`); ids beyond it stand for none, which
    is what a vocabulary padded to a round size has.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete with this token; the bytes of an incomplete one wait for the next."""
        data = self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end: U+FFFD where a character was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
