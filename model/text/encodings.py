"""Converts text in any encoding to UTF-8.

The rule, for files and for single values of records alike: a mark (the byte order mark U+FEFF) at the start names
UTF-8, UTF-16 or UTF-32 and is dropped; without one, UTF-16 and UTF-32 are recognized by their NULs, and everything else
is read as UTF-8. Single-byte encodings and Shift-JIS cannot be recognized, and a wrong guess would corrupt the text:
they are read only if `corpus.encoding` names them. Input that is invalid in its encoding becomes bytes that are not
UTF-8, for the reader to count.
"""

import codecs
import io
import unicodedata
from typing import BinaryIO

from model.settings.corpus import codec_of

HEAD_BYTES = 4096
"""Bytes of a file's start from which the encoding is determined."""
_CHUNK = 1 << 18
_INVALID = "\udcff"
"""Replaces invalid input; it is not valid UTF-8 itself."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS_OF_UTF16 = 0.3
"""Share of control characters in valid UTF-8 from which it is not read as UTF-8: in UTF-16, half of the bytes of ASCII,
of Cyrillic and of Thai are control characters."""
_NULS_OF_UTF16 = 0.02
"""Least share of NULs in UTF-16 whose other high bytes may be tabs and line ends, as those of Devanagari are."""
_HIGH_BYTES = 0.95
"""Share of such bytes among them."""
_MIN_CHARACTERS = 16
"""Characters below which a text is too short to tell such high bytes from tabs and line ends."""
_ON_INVALID = "model.text.invalid"
codecs.register_error(_ON_INVALID, lambda error: (_INVALID, error.end))  # type: ignore[attr-defined]


def find_encoding(head: bytes) -> tuple[str, int]:
    """(codec, length of the mark) of a text that starts with `head`: "utf-8" unless a mark or NULs say otherwise."""
    for mark, codec in _MARKS:
        if head.startswith(mark):
            if codec == "utf-32-le" and not _is_utf32(head, len(mark)):
                continue  # UTF-16 whose first character is a NUL
            return codec, len(mark)
    if b"\0" in head and not _is_utf8(head):
        found = [
            (head[high::width].count(0), codec) for codec, width, high in _WIDE if _is_in(head, codec, width, high)
        ]
        return (max(found)[1] if found else "utf-8"), 0
    return "utf-8", 0


def _named(name: str, head: bytes) -> tuple[str, int]:
    """(codec, length of the mark) of a text in the encoding that a person named; a mark says the order of its bytes."""
    codec = codec_of(name).removesuffix("-sig")
    for mark, found in _MARKS:
        if head.startswith(mark) and found.startswith(codec):
            return found, len(mark)
    if codec in ("utf-16", "utf-32"):  # whose decoders want a mark
        found, _ = find_encoding(head)
        return (found if found.startswith(codec) else f"{codec}-le"), 0
    return codec, 0


_WIDE = (("utf-32-le", 4, 3), ("utf-32-be", 4, 0), ("utf-16-le", 2, 1), ("utf-16-be", 2, 0))
"""Codecs, bytes of a character, and the index of the most significant one."""


def _is_utf32(head: bytes, mark: int) -> bool:
    """Whether `head`, after a mark of UTF-32-LE, is text in it: of whole characters unless the file is longer."""
    return (len(head) >= HEAD_BYTES or len(head) % 4 == 0) and _decoded(head[mark:], "utf-32-le") is not None


def _is_in(head: bytes, codec: str, width: int, high: int) -> bool:
    """Whether `head` is text in this codec: with ASCII, whose highest byte is NUL, and only characters of text."""
    if len(head) < HEAD_BYTES and len(head) % width:
        return False  # a whole text, of whole characters
    characters = len(head) // width
    nuls = head[high : characters * width : width].count(0)
    if nuls < (characters if width == 4 else 1):
        return False
    text = _decoded(head[: characters * width], codec)
    return bool(text) and not any(_is_control(character) for character in text or "")


def _decoded(head: bytes, codec: str) -> str | None:
    """`head` decoded, whose last character may be cut; None if it is not valid."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return None


def _is_control(character: str) -> bool:
    """Whether a character does not occur in text: control, private or unassigned."""
    return unicodedata.category(character) in ("Cc", "Cn", "Co") and character not in "\t\n\r\f"


def _is_utf8(head: bytes) -> bool:
    text = _decoded(head, "utf-8")
    if text is None or sum(map(_is_control, text)) >= _CONTROLS_OF_UTF16 * len(head):
        return False
    halves = [head[parity::2] for parity in (0, 1)]
    return not any(map(_are_high_bytes, halves))


def _are_high_bytes(half: bytes) -> bool:
    """Whether every second byte of a text is the high one of UTF-16, although it may be a tab or a line end."""
    small = sum(byte <= 0x20 for byte in half)  # 0x20: of a dash or a quotation mark
    is_enough = len(half) >= _MIN_CHARACTERS and half.count(0) >= _NULS_OF_UTF16 * len(half)
    return is_enough and small >= _HIGH_BYTES * len(half)


class Utf8Stream(io.RawIOBase):
    """A binary stream of text as UTF-8 without a mark; wrap it in io.BufferedReader.

    encoding: codec of the stream; empty: found by `find_encoding`. found: the codec in use. marked: whether a mark was
    dropped. first_invalid: offset in the stream of the first invalid byte, for codecs other than UTF-8.
    """

    def __init__(self, stream: BinaryIO, encoding: str = "") -> None:
        head = stream.read(HEAD_BYTES)
        while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(head))):
            head += more
        self._stream = stream
        self.found, mark = _named(encoding, head) if encoding else find_encoding(head)
        self.marked = mark > 0
        self.first_invalid: int | None = None
        self._decoder = None if self.found == "utf-8" else codecs.getincrementaldecoder(self.found)()
        self._offset, self._ended = mark, False
        self._ready = memoryview(self._convert(head[mark:], final=False))

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        """The next bytes of UTF-8; 0 at the end."""
        while not self._ready and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            self._ready = memoryview(self._convert(data, final=self._ended))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _convert(self, data: bytes, *, final: bool) -> bytes:
        if self._decoder is None:
            return data
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            self.first_invalid = self._offset - pending + error.start
            self._decoder = codecs.getincrementaldecoder(self.found)(_ON_INVALID)
            text = self._decoder.decode(error.object, final)
        self._offset += len(data)
        return text.encode("utf-8", "surrogatepass")


def to_utf8(data: bytes, encoding: str = "") -> tuple[bytes, str, bool]:
    """One value as UTF-8, the codec that it was in, and whether a mark was dropped."""
    if not encoding and not data.startswith(_STARTS) and b"\0" not in data[:HEAD_BYTES]:
        return data, "utf-8", False
    stream = Utf8Stream(io.BytesIO(data), encoding)
    return io.BufferedReader(stream).read(), stream.found, stream.marked


_STARTS = tuple(mark for mark, _ in _MARKS)
