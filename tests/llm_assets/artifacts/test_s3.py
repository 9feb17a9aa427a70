"""Artifacts and checkpoints on a real S3 server, which the tests start, kill and start again: SeaweedFS."""

import shutil
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from llm_assets.artifacts import remote as conditional
from llm_assets.artifacts.remote import replace_if_unchanged, revision
from llm_assets.artifacts.store import LATEST, ArtifactStore
from model.errors import PipelineError, TransientError
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints.remote import RemoteCheckpoints
from tests.llm_assets.artifacts.test_store import staged
from tests.model.training.checkpoints.test_remote import checkpoint
from tests.support.s3 import wait_until_it_stores, with_s3

pytestmark = with_s3


def versions(store: ArtifactStore) -> set[str]:
    """Folders that hold files: SeaweedFS lists an emptied folder for a while, S3 does not have folders."""
    base = store.root / "corpus" / "smoke"
    assert isinstance(base, UPath)
    base.fs.invalidate_cache()
    return {Path(name).relative_to(base.path).parts[0] for name in base.fs.find(base.path)} - {LATEST}


@pytest.fixture
def store(root: str, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(root, tmp_path / "cache")


def test_versions_are_published_verified_pruned_and_read_on_another_machine(store, root, tmp_path):
    published = [store.publish(staged(tmp_path, text)) for text in ("one", "two", "three", "four")]
    assert versions(store) == {one.version for one in published[1:]}
    assert store.publish(staged(tmp_path, "four")).unchanged
    elsewhere = ArtifactStore(root, tmp_path / "cache of another machine")
    assert (elsewhere.load("corpus", "smoke") / "folder" / "more.txt").read_text() == "more"
    assert (elsewhere.load("corpus", "smoke") / "data.txt").read_text() == "four"
    (store.root / "corpus" / "smoke" / published[-1].version / "data.txt").unlink()
    shutil.rmtree(tmp_path / "cache of another machine")
    with pytest.raises(PipelineError, match=r"data.txt is missing, but its manifest lists it"):
        elsewhere.load("corpus", "smoke")
    assert not store.publish(staged(tmp_path, "four")).unchanged
    assert (elsewhere.load("corpus", "smoke") / "data.txt").read_text() == "four"


def test_of_two_writers_of_latest_the_second_sees_the_first(store, root, tmp_path):
    pointer = UPath(root) / LATEST
    unseen = revision(pointer)
    assert unseen == "" and replace_if_unchanged(pointer, "one", unseen)
    assert not replace_if_unchanged(pointer, "two", unseen)
    seen = revision(pointer)
    assert replace_if_unchanged(pointer, "two", seen) and not replace_if_unchanged(pointer, "three", seen)
    assert replace_if_unchanged(pointer, "two", seen)  # a repeated request whose first attempt was written
    assert pointer.read_text() == "two"


def test_a_slow_writer_dates_its_version_after_the_one_that_overtook_it(store, root, tmp_path, monkeypatch):
    other = ArtifactStore(root, tmp_path / "cache of another machine")
    overtaken: list[str] = []

    def overtake(path: UPath, text: str, seen: str) -> bool:
        if not overtaken:
            overtaken.append("")  # the other machine's own call comes here too
            overtaken[0] = other.publish(staged(tmp_path, "other")).version
        return replace(path, text, seen)

    replace = conditional.replace_if_unchanged
    monkeypatch.setattr("llm_assets.artifacts.store.replace_if_unchanged", overtake)
    ours = store.publish(staged(tmp_path, "ours"))
    assert store.load("corpus", "smoke").name == ours.version
    assert [path.name for _, path in store._versions(store.root / "corpus" / "smoke")] == [ours.version, overtaken[0]]


def test_writers_at_the_same_time_leave_one_whole_latest_version(root, tmp_path):
    stores = [ArtifactStore(root, tmp_path / f"cache {number}") for number in range(4)]
    failed: list[Any] = []

    def publish(number: int) -> None:
        try:
            for text in range(3):
                stores[number].publish(staged(tmp_path / str(number), f"{number} {text}"))
        except Exception as error:  # noqa: BLE001 - the test shows it
            failed.append(error)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    newest = stores[0]._versions(stores[0].root / "corpus" / "smoke")[0][1].name
    assert ArtifactStore(root, tmp_path / "reader").load("corpus", "smoke").name == newest


def test_a_server_that_dies_leaves_the_version_before_and_no_half_of_the_next(server, store, tmp_path, monkeypatch):
    one = store.publish(staged(tmp_path, "one"))
    put = store._write_text

    def die(*arguments: Any) -> None:
        server.kill()  # the files of the version are there, its manifest is not
        put(*arguments)

    monkeypatch.setattr(store, "_write_text", die)
    half = staged(tmp_path, "half")
    with pytest.raises(TransientError, match=r"s3://artifacts/\w+ does not answer \(.*\): run again when it does"):
        store.publish(half)
    monkeypatch.undo()
    with pytest.raises(TransientError, match="does not answer"):
        store.load("corpus", "smoke")
    server.start()
    wait_until_it_stores()
    assert store.load("corpus", "smoke").name == one.version
    two = store.publish(staged(tmp_path, "two"))
    listed = versions(store) - {one.version, two.version}
    assert len(listed) == 1  # what is left of the half, which the next day's publication removes
    monkeypatch.setattr(conditional, "ABANDONED_AFTER", timedelta(0))
    store.publish(staged(tmp_path, "three"))
    assert not listed & versions(store) and {one.version, two.version} < versions(store)
    assert store.publish(half).latest


def test_wrong_credentials_and_a_missing_bucket_are_one_line(root, tmp_path, monkeypatch):
    import s3fs

    with pytest.raises(PipelineError, match=r"s3://no-such-bucket/a does not exist"):
        ArtifactStore("s3://no-such-bucket/a", tmp_path / "cache").publish(staged(tmp_path, "one"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PipelineError, match=r"refuses access .* in the environment, such as AWS_ACCESS_KEY_ID"):
        ArtifactStore(root, tmp_path / "cache").publish(staged(tmp_path, "one"))


def test_a_training_goes_on_from_its_copies_on_another_machine(root, tmp_path):
    here, there, lines = tmp_path / "here", tmp_path / "there", []
    checkpoint(here, 2)
    checkpoint(here, 4)
    RemoteCheckpoints(f"{root}/run", here, lines.append).push()
    checkpoints.prune(here, 1, None)
    RemoteCheckpoints(f"{root}/run", here, lines.append).push()
    RemoteCheckpoints(f"{root}/run", there, lines.append).fetch()
    assert checkpoints.steps_saved(there) == [4]
    RemoteCheckpoints(f"{root}/run", there, lines.append).remove()
    RemoteCheckpoints(f"{root}/run", tmp_path / "third", lines.append).fetch()
    assert not (tmp_path / "third").exists()
