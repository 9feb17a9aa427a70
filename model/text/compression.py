"""Decompresses files as streams that detect truncated files, and names the format of what is not text.

gzip is the standard library's, which accepts several members and padding by NULs. zstd is read frame by frame, since
zstandard's own stream ends silently at a truncation and Arrow's refuses the long windows of `zstd --long`.
"""

import gzip
import io
import zlib
from typing import BinaryIO

import zstandard

CODECS = {".gz": "gzip", ".zst": "zstd"}
_PIECE = 4096
"""Compressed bytes read at once: they never decompress to more than about 130 MB."""
_MAX_WINDOW_BYTES = 2**31


_FORMATS = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (4, b"1AY&SY", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x5d\0\0", "lzma"),
    (0, b"\x1f\x9d", "compress"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"\xff\x06\0\0sNaPpY", "Snappy"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a\x07", "RAR"),
    (257, b"ustar", "tar"),
    (0, b"PAR1", "Parquet"),
    (0, b"PARE", "encrypted Parquet"),
    (0, b"ARROW1\0", "Arrow"),
    (0, b"Obj\x01", "Avro"),
    (0, b"SQLite format 3\0", "SQLite"),
    (0, b"%PDF-", "PDF"),
    (0, b"{\\rtf", "RTF"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Word or Excel"),
)
"""Offset and bytes that mark a format, and its name: formats that hold text, which would be lost or cut to pieces.
Pictures and programs are left out as not UTF-8, like any other bytes."""
FORMAT_BYTES = 262
"""Bytes of a file's start that `format_of` looks at."""
_ENDINGS = {"gzip": ".gz", "zstd": ".zst", "Parquet": ".parquet"}


class BrokenFile(Exception):
    """A compressed file is damaged; the text is the reason, for the end of a message."""


def format_of(head: bytes) -> str:
    """The format of a file that starts with `head`; empty if nothing says that it is not text."""
    return next((name for at, mark, name in _FORMATS if head.startswith(mark, at)), "")


def advice_on(name: str = "") -> str:
    """What a person can do with a file of this format, for the end of a message."""
    if name in _ENDINGS:
        return f"let its name end in {_ENDINGS[name]}"
    return "convert or unpack it, or leave it out of corpus.paths"


def decompressed(stored: BinaryIO, codec: str) -> io.BufferedReader:
    """The content of a file compressed with `codec` ("gzip" or "zstd"). Reading raises BrokenFile if it is damaged."""
    raw: io.RawIOBase = _Gzip(stored) if codec == "gzip" else _Zstd(stored)
    return io.BufferedReader(raw, 1 << 20)


class _Gzip(io.RawIOBase):
    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._file = gzip.GzipFile(fileobj=stored, mode="rb")
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        try:
            size = self._file.readinto(buffer)
            if not size and not self._bytes and not self._stored.tell():
                raise EOFError  # an empty file, which GzipFile takes for an empty text
        except EOFError:
            raise BrokenFile("Truncated: the file ends before its end mark") from None
        except gzip.BadGzipFile as error:
            if str(error).startswith("Not a gzipped file") and self._bytes:
                raise BrokenFile("its end is followed by bytes that are not gzip") from None
            raise BrokenFile(str(error)) from None
        except zlib.error as error:
            raise BrokenFile(str(error)) from None
        self._bytes += size
        return size


class _Zstd(io.RawIOBase):
    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._ready = memoryview(b"")
        self._frames = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        while not self._ready:
            data, self._input = self._input or self._stored.read(_PIECE), b""
            if not data and self._frames and self._frame is None:
                return 0
            if not data:
                raise BrokenFile("Truncated: the file ends before its last frame does")
            if self._frames and self._frame is None:
                data = data.lstrip(b"\0")  # padding to whole blocks
                if not data:
                    continue
            self._take(data)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _take(self, data: bytes) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except zstandard.ZstdError as error:
            after = "its end is followed by bytes that are not zstd: " if self._frames else ""
            raise BrokenFile(f"{after}{error}") from None
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
            self._frames += 1
