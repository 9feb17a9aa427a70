import bz2
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models

from model.errors import PipelineError, limits_as_error
from model.settings import CorpusSettings
from model.text.corpus import SPLITS, build_corpus, read_documents, read_summary
from model.text.sources import Sources, whole_characters

TEXTS = [f"Document {number}: naïve café, 東京 {number * 7}\r\n\tsecond line  \n" for number in range(60)]


def files(*paths: object, **options: object) -> CorpusSettings:
    options = {"validation_fraction": 0.3} | options
    return CorpusSettings(source="files", paths=[str(path) for path in paths], **options)


def texts_of(corpus_dir: Path) -> list[str]:
    return [text for split in SPLITS for text in read_documents(corpus_dir, split)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    data = "".join(json.dumps({field: text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, column: pa.Array, field: str = "text") -> Path:
    pq.write_table(pa.table({field: column, "other": list(range(len(column)))}), path, row_group_size=7)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "lines.jsonl", TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_come_back_exactly(tmp_path: Path, name: str) -> None:
    summary = build_corpus(files(write_jsonl(tmp_path / name, TEXTS)), tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(TEXTS)
    assert (summary.documents, summary.bytes) == (60, sum(len(text.encode()) for text in TEXTS))
    assert summary.train_documents > summary.validation_documents > 0


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_of_every_text_type_come_back_exactly(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS).cast(kind))
    build_corpus(files(path), tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_each_text_file_is_one_document_with_its_path_as_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.md{suffix}").write_bytes(pack(text.encode()))
    monkeypatch.chdir(tmp_path)
    summary = build_corpus(files("in/**/*"), tmp_path / "out")
    assert summary.sources == 60
    rows = [row for shard in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(shard).to_pylist()]
    assert {row["source"]: row["text"] for row in rows} == {
        f"in/deep/{number:02}.md{suffix}": text for number, text in enumerate(TEXTS)
    }
    assert {row["id"] for row in rows} == {hashlib.blake2b(t.encode(), digest_size=16).hexdigest() for t in TEXTS}


def test_urls_are_read_through_fsspec(tmp_path: Path, lines: Path) -> None:
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(lines.read_bytes())
    for url in ("memory://corpus/*.jsonl", f"file://{lines}"):
        build_corpus(files(url), tmp_path / "out")
        assert sorted(texts_of(tmp_path / "out")) == sorted(TEXTS)


def test_a_file_named_twice_is_read_once(tmp_path: Path, lines: Path) -> None:
    summary = build_corpus(files(lines, tmp_path / "*.jsonl"), tmp_path / "out")
    assert (summary.sources, summary.documents, summary.duplicates) == (1, 60, 0)


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    build_corpus(files(write_jsonl(tmp_path / "a[1].jsonl", TEXTS)), tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 60


def test_the_standard_library_is_read_without_its_tests(tmp_path: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    summary = build_corpus(CorpusSettings(max_bytes=1_500_000), tmp_path)
    assert (summary.bytes, summary.license) == (1_500_000, "PSF-2.0")
    sources = [s for shard in tmp_path.glob("*.parquet") for s in pq.read_table(shard)["source"].to_pylist()]
    assert all((root / source).is_file() for source in sources)
    every = [source for source, _ in Sources(CorpusSettings())]
    assert "json/decoder.py" in every
    assert not [s for s in every if {"test", "tests", "site-packages"} & set(Path(s).parts)]


@pytest.mark.parametrize("saved", [False, True])
def test_a_local_hugging_face_data_set_streams(tmp_path: Path, saved: bool) -> None:
    folder = tmp_path / "data_set"
    if saved:
        import datasets

        datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        write_parquet(folder / "train.parquet", pa.array(TEXTS), "body")
    settings = CorpusSettings(source="huggingface", dataset=str(folder), text_field="body", validation_fraction=0.3)
    build_corpus(settings, tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(TEXTS)
    settings.text_field = "txt"
    with pytest.raises(PipelineError, match=r"no field 'txt'; found: body.*set corpus\.text_field"):
        build_corpus(settings, tmp_path / "out")


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    settings = CorpusSettings(source="huggingface", dataset=str(tmp_path / "nowhere"), dataset_split="train")
    with pytest.raises(PipelineError, match=r"nowhere' \(config None, split 'train'\) cannot be opened"):
        build_corpus(settings, tmp_path / "out")


def test_unusable_documents_are_counted_and_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "nothing.txt").write_bytes(b"")
    (folder / "spaces.txt").write_text(" \n\u3000\t")
    (folder / "twice.txt").write_text(TEXTS[5])
    surrogate = b'{"text": "\\ud800"}\n{"text": null}\n{"text": "\xff"}\n'
    (folder / "z.jsonl").write_bytes(surrogate)
    logged: list[str] = []
    summary = build_corpus(files(folder / "*"), tmp_path / "out", log=logged.append)
    assert (summary.documents, summary.invalid_utf8, summary.empty, summary.duplicates) == (60, 3, 3, 1)
    assert [Path(name).name for name in summary.invalid_utf8_sources] == ["latin.txt", "z.jsonl"]
    assert [Path(name).name for name in summary.empty_sources] == ["nothing.txt", "spaces.txt", "z.jsonl"]
    assert any("3 documents that are not UTF-8" in line and "latin.txt" in line for line in logged)
    assert "café" not in {text.strip() for text in texts_of(tmp_path / "out")}


def test_invalid_utf8_in_parquet_is_counted(tmp_path: Path) -> None:
    column = pa.array([*(text.encode() for text in TEXTS), b"\xff\xfd"], pa.binary())
    summary = build_corpus(files(write_parquet(tmp_path / "a.parquet", column)), tmp_path / "out")
    assert (summary.documents, summary.invalid_utf8) == (60, 1)


def test_a_document_keeps_its_split_when_others_come_and_go(tmp_path: Path, lines: Path) -> None:
    build_corpus(files(lines), tmp_path / "all")
    write_jsonl(lines, ["a new one", *reversed(TEXTS[::2])])
    build_corpus(files(lines), tmp_path / "half")
    for split in SPLITS:
        both = set(TEXTS[::2])
        assert both & set(read_documents(tmp_path / "all", split)) == both & set(
            read_documents(tmp_path / "half", split)
        )


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


@pytest.mark.parametrize("validation_bytes", [1_000_000, 150])
def test_a_validation_split_too_small_to_measure_with_takes_the_next_documents_by_hash(
    tmp_path: Path, validation_bytes: int
) -> None:
    texts = [f"{number:05}" + "." * (number % 81) for number in range(200)]
    size = sum(map(len, texts))
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    built = build_corpus(files(path, validation_fraction=1e-9, validation_bytes=validation_bytes), tmp_path / "out")
    held_out = set(read_documents(tmp_path / "out", "validation"))
    assert min(validation_bytes, 0.05 * size) <= built.validation_bytes < min(validation_bytes, 0.05 * size) + 86
    assert held_out == set(sorted(texts, key=hash_of)[: len(held_out)])
    assert sorted(texts_of(tmp_path / "out")) == sorted(texts)
    assert built.bytes == size and built.documents == 200


def test_a_validation_split_keeps_its_fraction_where_that_is_enough_or_the_next_document_is_most_of_the_text(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for validation_bytes in (0, 1_000_000):
        options = {"validation_fraction": 0.3, "validation_bytes": validation_bytes}
        build_corpus(files(path, **options), tmp_path / "out")
        assert all(hash_of(text) < 0.3 * 2**128 for text in read_documents(tmp_path / "out", "validation"))
        assert all(hash_of(text) >= 0.3 * 2**128 for text in read_documents(tmp_path / "out", "train"))
    first = min(TEXTS, key=hash_of)
    longest = next(
        text for text in (first + "!" * count for count in range(5000, 9000)) if hash_of(text) < hash_of(first)
    )
    path = write_jsonl(tmp_path / "b.jsonl", [longest, *TEXTS])
    with pytest.raises(PipelineError, match="the validation split is empty"):
        build_corpus(files(path, validation_fraction=1e-9), tmp_path / "out")


def test_split_by_position_holds_out_the_last_bytes_to_the_character(tmp_path: Path) -> None:
    text = "".join(TEXTS)
    path = tmp_path / "one.txt"
    path.write_bytes(text.encode())
    for document_bytes in (0, 500):
        settings = files(path, split_by="position", validation_fraction=0.25, document_bytes=document_bytes)
        summary = build_corpus(settings, tmp_path / "out")
        train, held_out = ("".join(read_documents(tmp_path / "out", split)) for split in SPLITS)
        assert train + held_out == text
        assert 0 <= len(text.encode()) * 0.75 - summary.train_bytes < 4


def test_pieces_of_a_file_end_at_line_ends_and_join_to_the_file(tmp_path: Path) -> None:
    text = "".join(TEXTS) + "no line end"
    path = tmp_path / "one.txt"
    path.write_bytes(text.encode())
    pieces = [data for _, data in Sources(files(path, document_bytes=200))]
    assert b"".join(pieces) == text.encode()
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert len(pieces) > 10 and max(map(len, pieces)) < 300


def test_a_line_without_end_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("東京é😀" * 300)
    pieces = [data.decode() for _, data in Sources(files(path, document_bytes=101))]
    assert "".join(pieces) == "東京é😀" * 300
    assert max(len(piece.encode()) for piece in pieces) <= 202


def test_whole_characters_never_splits_one() -> None:
    data = "aé東😀".encode()
    for length in range(len(data) + 1):
        assert data[: whole_characters(data, length)].decode() == data[:length].decode(errors="ignore")
        assert whole_characters(data[:length], length) == whole_characters(data, length)


def test_max_bytes_cuts_the_corpus_at_a_character(tmp_path: Path, lines: Path) -> None:
    summary = build_corpus(files(lines, max_bytes=1003), tmp_path / "out")
    assert 1000 <= summary.bytes <= 1003
    assert all("".join(TEXTS).find(text) >= 0 for text in texts_of(tmp_path / "out"))


def test_the_same_input_gives_the_same_bytes_on_disk(tmp_path: Path, lines: Path) -> None:
    for name in ("first", "second"):
        build_corpus(files(lines, shard_bytes=700), tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second and len(first) > 4


def test_shards_stay_below_their_size_and_a_rebuild_leaves_no_old_one(tmp_path: Path, lines: Path) -> None:
    build_corpus(files(lines, shard_bytes=700), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert len(shards) > 2
    assert all(sum(len(t.encode()) for t in pq.read_table(s)["text"].to_pylist()) <= 700 for s in shards)
    build_corpus(files(lines), tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == sorted(TEXTS)


def test_the_summary_is_read_back_as_written(tmp_path: Path, lines: Path) -> None:
    summary = build_corpus(files(lines, license="CC0-1.0"), tmp_path / "out")
    assert read_summary(tmp_path / "out") == summary
    assert summary.license == "CC0-1.0" and summary.sample in TEXTS
    assert summary.longest_document_bytes == max(len(text.encode()) for text in TEXTS)
    assert summary.mean_document_bytes == summary.bytes / 60


def broken(tmp_path: Path, name: str) -> CorpusSettings:
    """Settings that point at one kind of bad input."""
    path = tmp_path / name
    whole = write_jsonl(tmp_path / "whole.jsonl.gz", [text * 50 for text in TEXTS]).read_bytes()
    packed = zstandard.compress("".join(text * 50 for text in TEXTS).encode())
    match name:
        case "cut.jsonl.gz":
            path.write_bytes(whole[: len(whole) // 2])
        case "cut.txt.zst":
            path.write_bytes(packed[: len(packed) // 2])
        case "not.txt.gz":
            path.write_bytes(b"plain text after all")
        case "bad.jsonl":
            path.write_text('{"text": "good"}\n\n{"text": \n')
        case "list.jsonl":
            path.write_text('["text"]\n')
        case "field.jsonl":
            path.write_text('{"body": "x", "title": "y"}\n')
        case "number.jsonl":
            path.write_text('{"text": 7}\n')
        case "bad.parquet":
            path.write_bytes(b"PAR1 nothing more PAR1")
        case "cut.parquet":
            data = write_parquet(path, pa.array([text * 50 for text in TEXTS])).read_bytes()
            path.write_bytes(data[:200] + bytes(len(data) - 1200) + data[-1000:])
        case "field.parquet":
            write_parquet(path, pa.array(TEXTS), "body")
        case "number.parquet":
            write_parquet(path, pa.array([1, 2]))
        case "packed.parquet.gz":
            path.write_bytes(b"")
        case "empty.txt" | "empty.jsonl":
            path.write_bytes(b" \n")
        case "large.txt":
            path.write_text("x" * 2000)
            return files(path, shard_bytes=1000)
    return files(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"missing\.txt' matches no file"),
        ("cut.jsonl.gz", r"cut\.jsonl\.gz, line \d+: broken gzip file .*Truncated"),
        ("cut.txt.zst", r"cut\.txt\.zst: broken zstd file"),
        ("not.txt.gz", r"not\.txt\.gz: broken gzip file"),
        ("bad.jsonl", r"bad\.jsonl, line 3 is not JSON"),
        ("list.jsonl", r"list\.jsonl, line 1 is a JSON list; expected one object a line"),
        ("field.jsonl", r"line 1 has no field 'text'; found: body, title"),
        ("number.jsonl", r"line 1: field 'text' holds a number; expected text"),
        ("bad.parquet", r"bad\.parquet: broken Parquet file"),
        ("cut.parquet", r"cut\.parquet: broken Parquet file"),
        ("field.parquet", r"field\.parquet has no field 'text'; found: body, other"),
        ("number.parquet", r"field 'text' holds int64; expected text"),
        ("packed.parquet.gz", r"packed\.parquet\.gz: compressed Parquet is not read"),
        ("empty.txt", r"empty after cleaning: 1 sources, 0 documents not UTF-8, 1 empty"),
        ("empty.jsonl", r"empty after cleaning"),
        (
            "large.txt",
            r"large\.txt is one document of more than corpus\.shard_bytes \(1,000\): set corpus\.document_bytes",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as raised:
        build_corpus(broken(tmp_path, name), tmp_path / "out")
    assert "\n" not in str(raised.value)


def archive(kind: str) -> bytes:
    """A file of text in a format that is not text."""
    stored, text = io.BytesIO(), "".join(TEXTS).encode()
    match kind:
        case "zip":
            with zipfile.ZipFile(stored, "w") as made:
                made.writestr("a.txt", text)
        case "tar":
            with tarfile.open(fileobj=stored, mode="w") as made:
                entry = tarfile.TarInfo("a.txt")
                entry.size = len(text)
                made.addfile(entry, io.BytesIO(text))
        case "parquet":
            pq.write_table(pa.table({"text": TEXTS}), stored)
        case "pdf":
            stored.write(b"%PDF-1.7\n" + text)
        case _:
            pack = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
            stored.write(pack(text))
    return stored.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.bz2", "bz2", "holds bzip2 data: expected text; convert or unpack it"),
        ("a.jsonl.xz", "xz", "holds xz data: expected text; convert"),
        ("a.zip", "zip", "holds ZIP data"),
        ("a.tar", "tar", "holds tar data"),
        ("a.pdf", "pdf", "holds PDF data"),
        ("a.jsonl", "gz", r"holds gzip data: expected text; let its name end in \.gz"),
        ("a.txt", "parquet", r"holds Parquet data: expected text; let its name end in \.parquet"),
        ("a.pq", "parquet", r"holds Parquet data: expected text; let its name end in \.parquet"),
        ("a.gz", "zst", r"holds zstd data: expected gzip by its name; let its name end in \.zst"),
    ],
)
def test_a_format_that_is_not_text_is_named(tmp_path: Path, name: str, kind: str, message: str) -> None:
    (tmp_path / name).write_bytes(archive(kind))
    (tmp_path / "good.txt").write_text("".join(TEXTS))
    with pytest.raises(PipelineError, match=rf"{name} {message}"):
        build_corpus(files(tmp_path / "good.txt", tmp_path / name), tmp_path / "out")


def test_a_format_inside_a_compressed_file_is_named(tmp_path: Path) -> None:
    for kind, name in (("tar", "tar"), ("gz", "gzip")):
        (tmp_path / "a.gz").write_bytes(gzip.compress(archive(kind)))
        with pytest.raises(PipelineError, match=rf"a\.gz holds {name} data inside gzip: expected text; convert or unp"):
            build_corpus(files(tmp_path / "a.gz"), tmp_path / "out")


def test_a_glob_that_matches_nothing_names_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError) as raised:
        build_corpus(files("data/*.txt"), tmp_path / "out")
    assert "'data/*.txt'" in str(raised.value) and str(tmp_path) in str(raised.value)


def test_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nosuch://a/b' cannot be listed"):
        build_corpus(files("nosuch://a/b"), tmp_path / "out")


def test_a_split_without_documents_says_what_to_change(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text(TEXTS[0])
    with pytest.raises(PipelineError, match=r"split is empty: 1 documents .*set corpus\.split_by to 'position'"):
        build_corpus(files(path), tmp_path / "out")


def test_reading_a_folder_without_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="make it again"):
        list(read_documents(tmp_path, "train"))
    with pytest.raises(PipelineError, match="make it again"):
        read_summary(tmp_path)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A name on a full disk: a link, so that nothing that clears up can reach the device itself."""
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    return link


def test_a_full_disk_is_one_line_from_every_writer_and_other_errors_pass(tmp_path: Path, full: Path) -> None:
    message = r"no disk space left while writing to .*bytes free\): free some"
    table = pa.table({"a": list(range(100_000))})
    with pytest.raises(PipelineError, match=message), limits_as_error(tmp_path):  # noqa: SIM117
        with pq.ParquetWriter(full, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(PipelineError, match=message), limits_as_error(tmp_path / "not there yet"):
        full.write_text("x")
    with pytest.raises(PipelineError, match=message), limits_as_error(tmp_path):
        Tokenizer(models.BPE()).save(str(full))
    with pytest.raises(FileNotFoundError), limits_as_error(tmp_path):
        (tmp_path / "nothing").read_bytes()


def test_a_corpus_on_a_full_disk_is_one_line(tmp_path: Path, lines: Path, full: Path) -> None:
    (tmp_path / "out").mkdir()
    full.rename(tmp_path / "out" / "summary.json")
    with pytest.raises(PipelineError, match=r"no disk space left while writing to .*out \("):
        build_corpus(files(lines), tmp_path / "out")
