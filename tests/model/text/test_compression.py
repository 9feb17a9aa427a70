import gzip
import io
from pathlib import Path

import pytest
import zstandard

from model.text.compression import BrokenFile, decompressed

TEXT = "".join(f"line {number} of a text, naïve café\n" for number in range(20_000)).encode()
PACK = {"gzip": gzip.compress, "zstd": zstandard.compress}
BOTH = pytest.mark.parametrize("codec", PACK)


def read(data: bytes, codec: str) -> bytes:
    return decompressed(io.BytesIO(data), codec).read()


@BOTH
def test_whole_files_come_back_member_by_member(codec: str) -> None:
    pack = PACK[codec]
    assert read(pack(TEXT), codec) == TEXT
    assert read(pack(TEXT) + pack(b"") + pack(b"more"), codec) == TEXT + b"more"


@BOTH
@pytest.mark.parametrize("length", [1, 511, 5000, 1_000_000])
def test_padding_by_nuls_is_no_damage(codec: str, length: int) -> None:
    assert read(PACK[codec](TEXT) + bytes(length), codec) == TEXT
    assert read(PACK[codec](TEXT) + bytes(length) + PACK[codec](b"more"), codec) == TEXT + b"more"


@BOTH
@pytest.mark.parametrize("garbage", [b"x", b"garbage" * 1000, b"\0\0\0text"])
def test_bytes_after_the_end_are_told(codec: str, garbage: bytes) -> None:
    with pytest.raises(BrokenFile, match=f"its end is followed by bytes that are not {codec}|Truncated"):
        read(PACK[codec](TEXT) + garbage, codec)


@BOTH
def test_every_cut_is_told(codec: str) -> None:
    data = PACK[codec](TEXT[:3000])
    for length in range(len(data)):
        with pytest.raises(BrokenFile):
            read(data[:length], codec)


@BOTH
def test_damage_inside_is_told(codec: str) -> None:
    data = bytearray(
        zstandard.ZstdCompressor(write_checksum=True).compress(TEXT) if codec == "zstd" else PACK[codec](TEXT)
    )
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BrokenFile):
        read(bytes(data), codec)


def test_zstd_with_the_longest_window_is_read() -> None:
    for window_log in (27, 28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        assert read(packer.compress(TEXT) + packer.flush(), "zstd") == TEXT


def test_a_skippable_frame_of_zstd_is_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    assert read(skippable + zstandard.compress(TEXT) + skippable, "zstd") == TEXT


def test_a_small_file_of_much_text_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    stream = decompressed(io.BytesIO(zstandard.compress(bytes(300_000_000))), "zstd")
    assert sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) == 300_000_000
