import errno
import json
import shutil
import uuid
from pathlib import Path

import pytest

from llm_assets.artifacts.manifest import Manifest, seal
from llm_assets.artifacts.store import ArtifactStore
from model.errors import PipelineError


def staged(directory: Path, text: str, **fields: object) -> Path:
    """A sealed directory with a file, and one in a folder."""
    directory = directory / uuid.uuid4().hex
    (directory / "folder").mkdir(parents=True)
    (directory / "data.txt").write_text(text)
    (directory / "folder" / "more.txt").write_text("more")
    values: dict = {
        "asset": "corpus",
        "experiment": "smoke",
        "config": {},
        "code_version": "1",
        "upstream": {},
        "mlflow_run_id": None,
        "dagster_run_id": "a",
    }
    seal(directory, **(values | fields))
    return directory


@pytest.fixture(params=["folder", "file_url", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """The same behavior in a folder, behind a file URL and in an object store."""
    roots = {
        "folder": str(tmp_path / "root"),
        "file_url": (tmp_path / "root").as_uri(),
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return ArtifactStore(roots[request.param], tmp_path / "cache")


def versions(store: ArtifactStore) -> set[str]:
    return {path.name for path in (store.root / "corpus" / "smoke").iterdir()} - {"LATEST"}


def test_a_published_directory_loads_verified(store: ArtifactStore, tmp_path: Path) -> None:
    publication = store.publish(staged(tmp_path, "one"))
    loaded = store.load("corpus", "smoke")
    assert (loaded / "data.txt").read_text() == "one"
    assert (loaded / "folder" / "more.txt").read_text() == "more"
    assert loaded.name == publication.version == Manifest.read(loaded).version
    assert publication.latest
    assert not publication.unchanged


def test_the_latest_version_is_loaded_and_the_older_one_stays(store: ArtifactStore, tmp_path: Path) -> None:
    one, two = store.publish(staged(tmp_path, "one")), store.publish(staged(tmp_path, "two"))
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "two"
    assert versions(store) == {one.version, two.version}


def test_the_same_content_is_not_copied_again_and_its_record_is_renewed(store: ArtifactStore, tmp_path: Path) -> None:
    one = store.publish(staged(tmp_path, "one", config={"a": 1}))
    again = store.publish(staged(tmp_path, "one", config={"a": 2}, dagster_run_id="b"))
    assert again.unchanged
    assert again.path == one.path
    manifest = Manifest.read(store.load("corpus", "smoke"))
    assert (manifest.config, manifest.dagster_run_id) == ({"a": 2}, "b")


def test_going_back_to_earlier_content_makes_it_the_latest(store: ArtifactStore, tmp_path: Path) -> None:
    for text in ("one", "two", "one"):
        store.publish(staged(tmp_path, text))
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"


def test_only_the_newest_versions_are_kept(store: ArtifactStore, tmp_path: Path) -> None:
    published = [store.publish(staged(tmp_path, text)).version for text in ("one", "two", "three", "four", "five")]
    assert versions(store) == set(published[-3:])


def test_the_latest_is_kept_however_many_failed_after_it(store: ArtifactStore, tmp_path: Path) -> None:
    good = store.publish(staged(tmp_path, "good"))
    for text in ("bad 1", "bad 2", "bad 3", "bad 4"):
        assert not store.publish(staged(tmp_path, text, failed_checks=["is_good"])).latest
    assert store.load("corpus", "smoke").name == good.version
    assert len(versions(store)) == 4


def test_a_missing_artifact_is_named_with_the_command_that_makes_it(store: ArtifactStore) -> None:
    with pytest.raises(
        PipelineError, match=r"no corpus of experiment 'smoke' in .*--select 'corpus\+' --partition smoke"
    ):
        store.load("corpus", "smoke")


@pytest.mark.parametrize("damage", ["alter", "remove", "no manifest"])
def test_a_damaged_version_is_refused_by_path_and_mended_by_publishing_again(
    store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    publication = store.publish(staged(tmp_path, "one"))
    version = store.root / "corpus" / "smoke" / publication.version
    if damage == "alter":
        (version / "data.txt").write_text("altered")
    else:
        (version / ("data.txt" if damage == "remove" else "manifest.json")).unlink()
    with pytest.raises(PipelineError, match=r"manifest\.json in" if damage == "no manifest" else r"data\.txt"):
        store.load("corpus", "smoke")
    assert not store.publish(staged(tmp_path, "one")).unchanged
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"files": []}',
        b'{"files": {"data.txt": 7}}',
        b'{"files": {"data.txt": {"size": 1}}}',
        b'{"files": {"data.txt": {"size": 1, "sha256": "a"}}, "content_hash": "b"}',
    ],
)
def test_a_manifest_that_is_none_is_refused_by_path_and_mended_by_publishing_again(
    store: ArtifactStore, tmp_path: Path, text: bytes
) -> None:
    version = store.publish(staged(tmp_path, "one")).version
    (store.root / "corpus" / "smoke" / version / "manifest.json").write_bytes(text)
    assert store.latest_manifest("corpus", "smoke") is None
    with pytest.raises(PipelineError, match=r"manifest\.json (is not a manifest|was altered).*(make|materialize)"):
        store.load("corpus", "smoke")
    assert store.publish(staged(tmp_path, "one")).latest
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("created", 7),
        ("created", "today"),
        ("created", "9999-12-31T23:59:59.999+00:00"),
        ("config", []),
        ("upstream", 7),
    ],
)
def test_a_field_of_another_type_does_not_stop_the_next_version(
    store: ArtifactStore, tmp_path: Path, name: str, value: object
) -> None:
    version = store.publish(staged(tmp_path, "one")).version
    path = store.root / "corpus" / "smoke" / version / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert store.latest_manifest("corpus", "smoke") is None
    store.publish(staged(tmp_path, "two"))
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "two"


@pytest.mark.parametrize("text", [b"", b" \n", b"\xff", b"a\0b", b"../../elsewhere", b"/etc", b"x" * 5000])
def test_a_pointer_that_names_no_version_is_told_and_mended_by_publishing(
    store: ArtifactStore, tmp_path: Path, text: bytes
) -> None:
    store.publish(staged(tmp_path, "one"))
    (store.root / "corpus" / "smoke" / "LATEST").write_bytes(text)
    assert store.latest_manifest("corpus", "smoke") is None
    with pytest.raises(PipelineError, match=r"LATEST holds .*: expected the name of a version.*materialize"):
        store.load("corpus", "smoke")
    store.publish(staged(tmp_path, "one"))
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"


def test_a_folder_or_a_link_in_the_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    store.publish(staged(tmp_path, "one"))
    base = tmp_path / "root" / "corpus" / "smoke"
    (base / "LATEST").unlink()
    (base / "LATEST").symlink_to("LATEST")
    with pytest.raises(PipelineError, match="no corpus of experiment 'smoke'"):
        store.load("corpus", "smoke")
    (base / "LATEST").unlink()
    (base / "LATEST").mkdir()
    with pytest.raises(PipelineError, match="Is a directory; a folder is in the place of a file"):
        store.publish(staged(tmp_path, "two"))
    shutil.rmtree(base.parent)
    base.parent.write_text("a file")
    with pytest.raises(PipelineError, match="a file is in the place of a folder"):
        store.publish(staged(tmp_path, "two"))


def test_a_remote_version_is_read_through_a_cache_that_heals(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://{uuid.uuid4().hex}", tmp_path / "cache")
    store.publish(staged(tmp_path, "one"))
    cached = store.load("corpus", "smoke")
    assert cached.is_relative_to(tmp_path / "cache")
    (cached / "data.txt").write_text("damaged")
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"


def test_a_full_disk_leaves_the_last_version_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    store.publish(staged(tmp_path, "one"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)  # another file system
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(PipelineError, match="no disk space left while writing"):
        store.publish(staged(tmp_path, "two"))
    monkeypatch.undo()
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"
    assert len(versions(store)) == 1


def test_staging_on_another_file_system_is_copied(tmp_path: Path) -> None:
    memory = Path("/dev/shm") / uuid.uuid4().hex
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    try:
        store.publish(staged(memory, "one"))
    finally:
        shutil.rmtree(memory)
    assert (store.load("corpus", "smoke") / "data.txt").read_text() == "one"
    assert not list((tmp_path / "root" / "corpus" / "smoke").glob(".*"))
