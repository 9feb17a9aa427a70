"""Processes that publish and read the same artifacts at the same time."""

import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llm_assets.artifacts import locks
from llm_assets.artifacts.manifest import seal
from llm_assets.artifacts.store import ArtifactStore
from model.artifact import MANIFEST
from model.errors import PipelineError, TransientError

pytestmark = pytest.mark.medium

FORK = multiprocessing.get_context("fork")
AT_ONCE, ROUNDS = 5, 4


def staged(directory: Path, text: str) -> Path:
    """A sealed directory with enough files that making, verifying and removing it takes a moment."""
    directory = directory / uuid.uuid4().hex
    directory.mkdir(parents=True)
    for number in range(12):
        (directory / f"{number}.txt").write_text(f"{text} {number}")
    seal(
        directory,
        asset="corpus",
        experiment="smoke",
        config={},
        code_version="1",
        upstream={},
        mlflow_run_id=None,
        dagster_run_id="a",
    )
    return directory


def at_once(*works: Callable[[], object]) -> list[object]:
    """What each function returned or raised, all begun together in separate processes."""
    barrier = FORK.Barrier(len(works))

    def work(function: Callable[[], object], answer: Connection) -> None:
        barrier.wait()
        try:
            answer.send(function())
        except BaseException as error:  # noqa: BLE001 - the test shows it
            answer.send(repr(error))

    answers = []
    for function in works:
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=work, args=(function, sender))
        process.start()
        answers.append((receiver, process))
    found = [receiver.recv() for receiver, _ in answers]
    for _, process in answers:
        process.join()
    return found


def publications(store: ArtifactStore, scratch: Path) -> list[Callable[[], object]]:
    """Functions that publish the same content and return whether it was there."""
    folders = [staged(scratch, "same") for _ in range(AT_ONCE)]
    return [lambda folder=folder: store.publish(folder).unchanged for folder in folders]


def names(store: ArtifactStore) -> set[str]:
    return {path.name for path in (store.root / "corpus" / "smoke").iterdir()}


def test_processes_that_publish_the_same_content_at_once_make_one_version(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        store = ArtifactStore(str(tmp_path / str(number)), tmp_path / "cache")
        unchanged = at_once(*publications(store, tmp_path / "scratch"))
        assert sorted(map(str, unchanged)) == ["False", *["True"] * (AT_ONCE - 1)]
        assert names(store) == {store.load("corpus", "smoke").name, "LATEST"}


def test_processes_that_replace_the_same_damaged_version_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    for _ in range(ROUNDS):
        version = Path(store.publish(staged(tmp_path / "scratch", "same")).path)
        (version / "3.txt").write_text("altered")
        unchanged = at_once(*publications(store, tmp_path / "scratch"))
        assert sorted(map(str, unchanged)) == ["False", *["True"] * (AT_ONCE - 1)]
        assert names(store) == {store.load("corpus", "smoke").name, "LATEST"}


def test_the_latest_is_whole_while_processes_publish_different_content_and_keep_one_version(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache", keep_versions=1)
    store.publish(staged(tmp_path / "scratch", "first"))

    def publishes(name: str) -> Callable[[], object]:
        folders = [staged(tmp_path / "scratch", f"{name} {number % 3}") for number in range(ROUNDS)]
        return lambda: [store.publish(folder).latest for folder in folders]

    def reads() -> object:
        read = []
        for _ in range(4 * ROUNDS):
            version = store.load("corpus", "smoke")
            read.append(len(list(version.glob("*.txt"))))
            for descriptor in locks._held.values():
                os.close(descriptor)  # as at the end of a step's process
            locks._held.clear()
        return read

    found = at_once(publishes("a"), publishes("b"), publishes("c"), reads, reads)
    assert found == [[True] * ROUNDS] * 3 + [[12] * 4 * ROUNDS] * 2
    store.publish(staged(tmp_path / "scratch", "last"))
    assert names(store) == {store.load("corpus", "smoke").name, "LATEST"}


def test_readers_of_a_remote_version_fetch_it_into_their_cache_once(tmp_path: Path) -> None:
    remote = ArtifactStore(f"memory://{uuid.uuid4().hex}", tmp_path / "cache")  # each process forks with its content
    remote.publish(staged(tmp_path / "scratch", "one"))
    for _ in range(ROUNDS):
        found = at_once(*[lambda: len(list(remote.load("corpus", "smoke").glob("*.txt")))] * AT_ONCE)
        assert found == [12] * AT_ONCE
        shutil.rmtree(tmp_path / "cache")


def test_a_version_that_a_process_reads_is_removed_after_it_has_ended(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache", keep_versions=1)
    read = Path(store.publish(staged(tmp_path / "scratch", "read")).path)
    ours, theirs = FORK.Pipe()

    def reads() -> None:
        theirs.send(str(store.load("corpus", "smoke")))
        theirs.recv()

    reader = FORK.Process(target=reads)
    reader.start()
    assert ours.recv() == str(read)
    for text in ("two", "three"):
        store.publish(staged(tmp_path / "scratch", text))
    assert (read / "3.txt").read_text() == "read 3"
    assert len(names(store)) == 3
    ours.send("end")
    reader.join()
    newest = store.publish(staged(tmp_path / "scratch", "four")).version
    assert names(store) == {newest, "LATEST"}


def test_what_killed_processes_left_on_the_way_is_deleted_by_the_next_publication(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    base = Path(store.publish(staged(tmp_path / "scratch", "one")).path).parent
    staged(base, "two").rename(base / ".incoming-1")
    staged(base, "three").rename(base / ".removed-1")
    (base / ".fresh-1").write_text("half")
    newest = store.publish(staged(tmp_path / "scratch", "four")).version
    assert not list(base.glob(".*"))
    assert store.load("corpus", "smoke").name == newest


def test_versions_stay_in_the_order_of_their_publication_when_the_clock_goes_back(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache", keep_versions=2)
    published = []
    for year in (2031, 2030, 1970, 2029):
        directory = staged(tmp_path / "scratch", str(year))
        fields = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps({**fields, "created": f"{year}-01-01T00:00:00.000+00:00"}))
        published.append(store.publish(directory).version)
    assert names(store) == {*published[-2:], "LATEST"}


def test_a_manifest_of_another_schema_does_not_stop_a_publication(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache", keep_versions=1)
    old = Path(store.publish(staged(tmp_path / "scratch", "old")).path)
    fields = json.loads((old / MANIFEST).read_text())
    (old / MANIFEST).write_text(json.dumps({**fields, "schema_version": 0}))
    newest = store.publish(staged(tmp_path / "scratch", "new")).version
    assert names(store) == {newest, "LATEST"}


def test_a_publication_that_does_not_end_is_named_with_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    good = store.publish(staged(tmp_path / "scratch", "one")).version
    monkeypatch.setattr(locks, "WAIT_S", 0.05)
    lock = tmp_path / "root" / "corpus" / ".smoke.lock"
    with locks.exclusive(lock), pytest.raises(TransientError, match=rf"{lock} for 0 s: expected .* run again"):
        store.publish(staged(tmp_path / "scratch", "two"))
    assert store.load("corpus", "smoke").name == good


def test_a_root_for_reading_only_is_read(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    version = Path(store.publish(staged(tmp_path / "scratch", "one")).path)
    (tmp_path / "root" / "corpus" / ".smoke.lock").unlink()
    (version / "3.txt").unlink()
    with pytest.raises(PipelineError, match=r"3\.txt is missing"):
        store.load("corpus", "smoke")
    assert not (tmp_path / "root" / "corpus" / ".smoke.lock").exists()
