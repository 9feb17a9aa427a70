"""A corpus that tasks read, deduplicate and write has the files of one that is built in one process."""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from model.errors import PipelineError
from model.settings import CorpusSettings
from model.text import parts
from model.text.corpus import build_corpus
from model.text.parts import ReadTask, in_tasks, read
from tests.model.text.applied import in_any_order, twice_each
from tests.model.text.test_shards import files


def write_sources(folder: Path) -> Path:
    """Files of all kinds, with what a corpus leaves out: repeated, empty and broken documents."""
    folder.mkdir()
    for number in range(9):
        lines = [f"record {number} {line} naïve café, 東京\n" * (1 + line % 7) for line in range(40)]
        lines += ["the same everywhere", "", f"shared by two {number // 2}"]
        data = "".join(json.dumps({"text": line, "answer": f"{line} yes"}) + "\n" for line in lines).encode()
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"plain text {number}: {'æ€' * 50}\n" * 20)
        (folder / f"broken {number}.txt").write_bytes(b"not UTF-8: \xff\xfe\x00 here" if number % 2 else b"NUL \0")
        (folder / f"wide {number}.txt").write_bytes(f"wide {number} ü\n".encode("utf-16"))
    (folder / "link.txt").symlink_to("nowhere")
    return folder


PART_BYTES = 1_500
CASES: dict[str, dict[str, Any]] = {
    "hash": {},
    "the split enlarged": {"validation_fraction": 0.001},
    "position": {"split_by": "position"},
    "position, one large document": {"split_by": "position", "validation_fraction": 0.97},
    "chunks": {"document_bytes": 300},
    "conversations": {"split_by": "position", "text_field": "text", "response_field": "answer"},
    "mixture": {"source": "mixture"},
    "the first bytes": {"max_bytes": 9_000},
}


def settings_of(case: str, folder: Path) -> CorpusSettings:
    options: dict[str, Any] = {"source": "files", "shard_bytes": 6_000, "validation_fraction": 0.2} | CASES[case]
    if options["source"] == "files":
        options["paths"] = [str(folder / "*")]
    if "response_field" in options:
        options["paths"] = [str(folder / "*.gz")]
    if options["source"] == "mixture":
        options["mixture"] = {
            "records": {"paths": [str(folder / "*.jsonl.gz")]},
            "again": {"paths": [str(folder / "[0-3].jsonl.gz")]},
            "plain": {"paths": [str(folder / "*.txt")]},
        }
    return CorpusSettings(**options)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PREFIX_DOCUMENTS", 60)
    monkeypatch.setattr(parts, "ROW_GROUP_DOCUMENTS", 7)


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_one_process(case: str, tmp_path: Path) -> None:
    settings = settings_of(case, write_sources(tmp_path / "sources"))
    whole, said = build_corpus(settings, tmp_path / "whole"), []
    expected = files(tmp_path / "whole")
    assert len(expected) > 2
    for apply in (map, in_any_order, twice_each):
        output, scratch = tmp_path / apply.__name__, tmp_path / f"scratch of {apply.__name__}"
        assert build_corpus(settings, output, log=said.append, write=in_tasks(apply, scratch, PART_BYTES)) == whole
        assert files(output) == expected
        assert not scratch.exists() or list(scratch.iterdir()) == []


def test_another_attempt_reads_only_what_is_missing_or_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, did = write_sources(tmp_path / "sources"), []
    settings = settings_of("hash", folder)

    def stopped(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        for item in items:
            if function is parts.write:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.raises(KeyboardInterrupt):
        build_corpus(settings, tmp_path / "stopped", write=in_tasks(stopped, tmp_path / "scratch", PART_BYTES))
    (folder / "3.txt").write_text((folder / "3.txt").read_text().replace("plain", "other"))
    read_into = parts._read_into

    def seen(staged: Path, task: ReadTask) -> None:
        did.append(str(task))
        read_into(staged, task)

    monkeypatch.setattr(parts, "_read_into", seen)
    build_corpus(settings, tmp_path / "resumed", write=in_tasks(map, tmp_path / "scratch", PART_BYTES))
    assert len(did) == 1 and "3.txt" in did[0]
    build_corpus(settings, tmp_path / "whole")
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_a_file_that_cannot_be_read_is_named_and_leaves_no_part(tmp_path: Path) -> None:
    folder = write_sources(tmp_path / "sources")
    (folder / "5.jsonl.gz").write_bytes((folder / "5.jsonl.gz").read_bytes()[:50])
    with pytest.raises(PipelineError, match=r"5.jsonl.gz, line \d+: broken gzip file"):
        build_corpus(
            settings_of("hash", folder), tmp_path / "out", write=in_tasks(map, tmp_path / "scratch", PART_BYTES)
        )
    assert not [path for path in (tmp_path / "scratch" / "parts").iterdir() if path.name.startswith(".")]
    small = CorpusSettings(source="files", paths=[str(folder / "1.txt")], shard_bytes=100)
    with pytest.raises(PipelineError, match=r"1.txt is one document of more than corpus.shard_bytes"):
        read(ReadTask(small, tuple(parts.Sources(small).files), tmp_path / "part"))
    assert not (tmp_path / "part").exists()
