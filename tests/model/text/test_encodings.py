import codecs
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from model.errors import PipelineError
from model.settings import CorpusSettings
from model.text.corpus import SPLITS, CorpusSummary, build_corpus, read_documents
from model.text.encodings import HEAD_BYTES, Utf8Stream, find_encoding, to_utf8

ENGLISH = [f"Line {n}: plain words\r\n\tand a second line\n" for n in range(40)]
TEXTS = {
    "english": ENGLISH,
    "german": [f"Straße {n}: über größere Flüsse\n" for n in range(40)],
    "russian": [f"Строка {n} о погоде и о реках\n" for n in range(40)],
    "greek": [f"Γραμμή {n} για τα ποτάμια\n" for n in range(40)],
    "japanese": [f"第{n}行は一つの文章です。\n川と山。\n" for n in range(40)],
    "hindi": [f"पंक्ति {n} नदी के बारे में\n" for n in range(40)],
    "telugu": [f"పంక్తి {n} నది గురించి\n" for n in range(40)],
    "emoji": [f"🙂 {n} 👩‍👩‍👧 ok\n" for n in range(40)],
}
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def build(tmp_path: Path, log: list[str] | None = None, **options: object) -> tuple[CorpusSummary, list[str]]:
    """The corpus of the files in tmp_path/in, and its documents, sorted."""
    settings = CorpusSettings(
        source="files", paths=[str(tmp_path / "in" / "*")], **({"validation_fraction": 0.3} | options)
    )
    summary = build_corpus(settings, tmp_path / "out", log=(log if log is not None else []).append)
    return summary, sorted(text for split in SPLITS for text in read_documents(tmp_path / "out", split))


def store(tmp_path: Path, kind: str, texts: list[str], codec: str, mark: bytes) -> None:
    """The documents as files of one kind, in one encoding."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if kind.endswith(".gz") else bytes
    match kind.removesuffix(".gz"):
        case "txt":
            for n, text in enumerate(texts):
                (folder / f"{n}.{kind}").write_bytes(pack(mark + text.encode(codec)))
        case "jsonl":
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (folder / f"a.{kind}").write_bytes(pack(mark + lines.encode(codec)))
        case "parquet":
            column = pa.array([mark + text.encode(codec) for text in texts], pa.binary())
            pq.write_table(pa.table({"text": column}), folder / "a.parquet")


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("marked", [True, False], ids=["with a mark", "without a mark"])
@pytest.mark.parametrize("codec", ["utf-8", *WIDE])
def test_unicode_is_found_and_converted_and_counted(tmp_path: Path, codec: str, marked: bool, kind: str) -> None:
    store(tmp_path, kind, ENGLISH, codec, MARKS[codec] if marked else b"")
    logged: list[str] = []
    summary, texts = build(tmp_path, logged)
    assert texts == sorted(ENGLISH)
    assert (summary.invalid_utf8, summary.nul) == (0, 0)
    values = 1 if kind.startswith("jsonl") else 40
    if codec == "utf-8":
        assert summary.converted == ({"UTF-8 with a mark": values} if marked else {})
    else:
        assert summary.converted == {codec.upper(): values}
    if summary.converted:
        assert summary.converted_sources
        assert any("converted to plain UTF-8" in line and summary.converted_sources[0] in line for line in logged)


@pytest.mark.parametrize("codec", WIDE)
@pytest.mark.parametrize("language", TEXTS)
def test_unmarked_text_of_any_language_is_found_by_its_nuls(language: str, codec: str) -> None:
    text = "".join(TEXTS[language])
    for length in (60, 400, len(text)):
        data = text[:length].encode(codec)
        assert find_encoding(data[:HEAD_BYTES]) == (codec, 0)
        assert to_utf8(data) == (text[:length].encode(), codec, False)


@pytest.mark.parametrize("language", TEXTS)
def test_utf8_is_never_taken_for_another_encoding(language: str) -> None:
    text = "".join(TEXTS[language])
    for plain in (
        text,
        text.replace(" ", "\0"),
        text[:50] + "\0",
        "\0" + text[:50],
        "\0" * 20,
        "a\0b\0c and so on",
        "\n\n\n\n",
    ):
        assert find_encoding(plain.encode()[:HEAD_BYTES]) == ("utf-8", 0)


def is_utf32(data: bytes) -> bool:
    if not data.startswith(codecs.BOM_UTF32_LE):
        return False
    try:
        data.decode("utf-32")
    except UnicodeDecodeError:
        return False
    return True


@given(st.text(), st.sampled_from(sorted(MARKS)))
@example("\0" + "0", "utf-16-le")
@example("\0" + "some text", "utf-16-le")
def test_marked_text_comes_back_exactly(text: str, codec: str) -> None:
    data = MARKS[codec] + text.encode(codec, "surrogatepass")
    # A NUL after the mark of UTF-16 makes that of UTF-32: what is valid in both is taken for UTF-32.
    assume(codec != "utf-16-le" or not is_utf32(data))
    converted, _, marked = to_utf8(data)
    assert (converted, marked) == (text.encode(), True)


@given(
    st.binary(max_size=300),
    st.sampled_from(["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig", "cp1252", "shift_jis", ""]),
)
def test_no_bytes_whatever_raise_and_bad_ones_are_never_valid_utf8(data: bytes, codec: str) -> None:
    stream = Utf8Stream(io.BytesIO(data), codec)
    converted = io.BufferedReader(stream).read()
    if stream.first_invalid is not None:
        assert 0 <= stream.first_invalid < len(data)
        with pytest.raises(UnicodeDecodeError):
            converted.decode()


@pytest.mark.parametrize(
    ("codec", "texts"),
    [
        ("latin-1", TEXTS["german"]),
        ("cp1252", [f"{text} “quoted” € 5\n" for text in TEXTS["german"]]),
        ("shift_jis", TEXTS["japanese"]),
        ("koi8-r", TEXTS["russian"]),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_other_encodings_are_left_out_and_named_until_the_settings_name_them(
    tmp_path: Path, codec: str, texts: list[str], kind: str
) -> None:
    store(tmp_path, kind, texts, codec, b"")
    (tmp_path / "in" / "z.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
    logged: list[str] = []
    summary, found = build(tmp_path, logged)
    assert found == sorted(ENGLISH) and summary.invalid_utf8 == 40
    assert "byte " in summary.invalid_places[0] and any(summary.invalid_places[0] in line for line in logged)
    (tmp_path / "in" / "z.jsonl").unlink()
    summary, found = build(tmp_path, encoding=codec)
    assert found == sorted(texts)
    assert sum(summary.converted.values()) == (1 if kind == "jsonl" else 40)


def test_the_first_byte_that_is_no_text_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = "é" * 300_000
    (folder / "a.txt").write_bytes(good.encode() + b"\xff tail")
    (folder / "b.txt").write_bytes(
        codecs.BOM_UTF16_LE + good.encode("utf-16-le") + b"\x00\xd8" + "x".encode("utf-16-le")
    )
    (folder / "c.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    (folder / "d.txt").write_bytes(b"one\0two\n")
    (folder / "e.txt").write_bytes(codecs.BOM_UTF16_BE + "odd\n".encode("utf-16-be") + b"x")
    (folder / "z.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
    summary, _ = build(tmp_path)
    places = [Path(place).name for place in summary.invalid_places]
    assert places == ["a.txt (byte 600,000)", "b.txt (byte 600,002)", "c.jsonl (line 2, byte 10)", "e.txt (byte 10)"]
    assert (summary.invalid_utf8, summary.nul) == (4, 1)
    assert [Path(place).name for place in summary.nul_places] == ["d.txt (byte 3)"]


def test_a_file_of_several_encodings_loses_only_the_pieces_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [text.encode() for text in ENGLISH]
    lines[20] = "Größe in Latin-1\n".encode("latin-1")
    (folder / "mixed.txt").write_bytes(b"".join(lines))
    summary, texts = build(tmp_path, document_bytes=40)
    assert summary.invalid_utf8 == 1 and len(texts) == summary.documents > 30
    assert summary.invalid_places[0].endswith(f"(byte {len(b''.join(lines[:20])) + 2:,})")


def test_a_corpus_of_another_encoding_says_how_to_read_it(tmp_path: Path) -> None:
    store(tmp_path, "txt", TEXTS["german"], "latin-1", b"")
    with pytest.raises(
        PipelineError, match=r"40 documents not UTF-8 \(first in .*0\.txt \(byte 4\)\).*set corpus\.encoding"
    ):
        build(tmp_path)


@pytest.mark.parametrize("name", ["nosuch", "base64", "rot13", "hex", "idna", "punycode", "unicode_escape", "charmap"])
def test_an_encoding_that_python_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(PipelineError, match=r"corpus\.encoding"):
        CorpusSettings(source="files", paths=["x"], encoding=name)


@pytest.mark.parametrize("named", ["utf-16", "UTF_16", "utf-16-le", "utf-16-be", "utf-32", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_named_unicode_encoding_is_read_with_and_without_a_mark(named: str, marked: bool) -> None:
    codec = {"utf-16": "utf-16-le", "UTF_16": "utf-16-be", "utf-32": "utf-32-be", "utf-8-sig": "utf-8"}.get(
        named, named
    )
    text = "".join(ENGLISH)
    converted, found, _ = to_utf8((MARKS[codec] if marked else b"") + text.encode(codec), named)
    assert (converted.decode(), found) == (text, codec)


def test_the_bytes_of_parquet_strings_and_of_json_lose_a_mark_alike(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    marked = [f"\ufeff{text}" for text in ENGLISH]
    pq.write_table(pa.table({"text": pa.array(marked[:20])}), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in marked[20:]))
    summary, texts = build(tmp_path)
    assert texts == sorted(ENGLISH) and summary.converted == {"UTF-8 with a mark": 40}
