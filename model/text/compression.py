"""Decompresses files as streams that detect truncated files.

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
_LONGEST_WINDOW = 2**31


class BrokenFile(Exception):
    """A compressed file is damaged; the text is the reason, for the end of a message."""


def decompressed(stored: BinaryIO, codec: str) -> BinaryIO:
    """The content of a file compressed with `codec` ("gzip" or "zstd"). Reading raises BrokenFile if it is damaged."""
    raw: io.RawIOBase = _Gzip(stored) if codec == "gzip" else _Zstd(stored)
    return io.BufferedReader(raw, 1 << 20)


class _Gzip(io.RawIOBase):
    def __init__(self, stored: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=stored, mode="rb")
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        try:
            size = self._file.readinto(buffer)
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
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
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
