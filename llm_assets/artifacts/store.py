"""Published artifacts: immutable versions and the pointer to the latest, in a folder or an object store.

    <root>/<asset>/<experiment>/<first 16 digits of the content hash>/...   manifest.json is written last
    <root>/<asset>/<experiment>/LATEST                                      the version's name, replaced atomically
    <root>/<asset>/.<experiment>.lock                                       held by the process that publishes

A reader follows the pointer to the manifest and verifies every digest in it. The root is a folder or a URL that fsspec
opens; versions of a remote root are read through a local cache. Processes that share a folder publish one after the
other, and none removes a version that another is reading; an object store has no locks, so there the lock covers only
the processes of one machine, and LATEST is replaced by conditional writes. No Dagster here: `io_manager.py` calls this.
"""

import dataclasses
import errno
import os
import shutil
import uuid
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from upath import UPath

from llm_assets.artifacts.locks import exclusive, hold, unread
from llm_assets.artifacts.manifest import VERSION_DIGITS, Manifest, refresh_command
from llm_assets.artifacts.remote import is_abandoned, refusals, replace_if_unchanged, revision
from llm_assets.paths import var_dir
from model.artifact import MANIFEST, verify
from model.errors import PipelineError, TransientError, limits_as_error

LATEST = "LATEST"
_INCOMING, _REMOVED, _FRESH = ".incoming-", ".removed-", ".fresh-"
"""Prefixes of temporary names: a version being published, a version being removed, and a new LATEST or manifest.

Only the lock's holder creates them.
"""


@dataclass(frozen=True)
class Publication:
    """Location of a version; `unchanged`: the content was already published."""

    path: str
    version: str
    unchanged: bool
    latest: bool


class ArtifactStore:
    """Versions of artifacts below `root`; the newest `keep_versions` of each are kept, and the one LATEST names."""

    def __init__(self, root: str, cache_dir: Path, keep_versions: int = 3) -> None:
        path = UPath(root)
        self._local = path.protocol in ("", "file", "local")
        self.root: UPath | Path = Path(path.path).absolute() if self._local else path
        self._cache_dir, self._keep_versions = cache_dir, keep_versions

    @classmethod
    def default(cls, root: str = "", cache_dir: str = "", keep_versions: int = 3) -> "ArtifactStore":
        """The store at `root`, else LLM_ASSETS_ARTIFACTS, else var/artifacts; cached at `cache_dir`, else var/cache."""
        root = root or os.environ.get("LLM_ASSETS_ARTIFACTS") or str(var_dir() / "artifacts")
        return cls(root, Path(cache_dir or var_dir() / "cache"), keep_versions)

    @property
    def is_remote(self) -> bool:
        """Whether versions are in an object store, which other machines read."""
        return not self._local

    def publish(self, staging: Path) -> Publication:
        """Make a sealed directory a version, and the latest one unless it failed a blocking check.

        `staging` may be moved. The previous version stays intact even if publishing fails.
        Raises PipelineError for a directory without a manifest and for a full disk.
        """
        with self._refusals(), limits_as_error(Path(str(self.root)) if self._local else staging):
            manifest = Manifest.read(staging)
            with exclusive(self._lock(manifest.asset, manifest.experiment)):
                return self._publish(staging, manifest)

    def _publish(self, staging: Path, manifest: Manifest) -> Publication:
        base = self.root / manifest.asset / manifest.experiment
        target = base / manifest.version
        if self._local:
            _delete_leftovers(Path(str(base)))
        manifest = self._dated_last(base, manifest)
        unchanged = self._is_intact(target, manifest)
        if unchanged:
            # Same content from another run: only its provenance is new.
            self._write_text(base, f"{manifest.version}/{MANIFEST}", manifest.to_json())
        else:
            self._place(staging, target, manifest)
        latest = not manifest.failed_checks
        if latest:
            self._point(base, manifest)
            if not self._local and not self._is_intact(target, manifest):
                # Another machine removed it as an old version before it became the latest.
                self._place(staging, target, manifest)
        self._prune(base)
        return Publication(str(target), manifest.version, unchanged, latest)

    def _point(self, base: Path | UPath, manifest: Manifest) -> None:
        """Make a version the latest one, and its date later than that of each version that was the latest before."""
        pointer = base / LATEST
        if not isinstance(pointer, UPath) or self._local:
            self._write_text(base, LATEST, manifest.version + "\n")
            return
        while True:
            seen = revision(pointer)
            dated = self._dated_last(base, manifest)
            if dated.created != manifest.created:  # another machine has published meanwhile
                manifest = dated
                self._write_text(base, f"{manifest.version}/{MANIFEST}", manifest.to_json())
            if replace_if_unchanged(pointer, manifest.version + "\n", seen):
                return

    def _refusals(self) -> AbstractContextManager[None]:
        return nullcontext() if self._local else refusals(str(self.root))

    def _lock(self, asset: str, experiment: str) -> Path:
        folder = Path(str(self.root)) if self._local else self._cache_dir
        return folder / asset / f".{experiment}.lock"

    def _dated_last(self, base: Path | UPath, manifest: Manifest) -> Manifest:
        """The manifest with a date later than every other version's, even if the clock has gone back."""
        others = [created for created, path in self._versions(base) if path.name != manifest.version]
        last = max(others, default="")
        if manifest.created > last:
            return manifest
        later = datetime.fromisoformat(last) + timedelta(milliseconds=1)
        return dataclasses.replace(manifest, created=later.isoformat(timespec="milliseconds"))

    def _place(self, staging: Path, target: Path | UPath, manifest: Manifest) -> None:
        if self._local:
            (staging / MANIFEST).write_text(manifest.to_json())
            _publish_folder(staging, Path(str(target)))
        else:
            self._upload(staging, target, manifest)

    def latest_manifest(self, asset: str, experiment: str) -> Manifest | None:
        """The manifest of the latest version; None if it is missing or unreadable."""
        base = self.root / asset / experiment
        with self._refusals():
            version = (self._read_text(base / LATEST) or "").strip()
            text = self._read_text(base / version / MANIFEST) if _is_version(version) else None
        if text is None:
            return None
        try:
            return Manifest.from_json(text, base)
        except PipelineError:
            return None

    def load(self, asset: str, experiment: str) -> Path:
        """The verified local folder of the latest version.

        Raises PipelineError naming the path if there is none, or if a file is missing or altered.
        """
        try:
            with self._refusals():
                return self._load(asset, experiment)
        except (PipelineError, FileNotFoundError) as error:
            if isinstance(error, TransientError):
                raise
            lock = self._lock(asset, experiment)
            if self._local and not os.access(lock, os.W_OK):
                raise  # no lock file: no process has published here with locks, or the folder is read-only
            # A publication may have replaced or removed it meanwhile.
            with exclusive(lock), self._refusals():
                return self._load(asset, experiment)

    def _load(self, asset: str, experiment: str) -> Path:
        base = self.root / asset / experiment
        text = self._read_text(base / LATEST)
        if text is None:
            raise PipelineError(
                f"no {asset} of experiment {experiment!r} in {base}; materialize it: "
                f"{refresh_command(asset, experiment)}"
            )
        version = text.strip()
        if not _is_version(version):
            raise PipelineError(
                f"{base / LATEST} holds {version[:50]!r}: expected the name of a version beside it; materialize it "
                f"again: {refresh_command(asset, experiment)}"
            )
        source = base / version
        if isinstance(source, Path) and self._local:
            with suppress(FileNotFoundError, NotADirectoryError):
                hold(source)
            verify(source)
            return source
        return self._download(source, self._cache_dir / asset / experiment / version)

    def _is_intact(self, target: Path | UPath, manifest: Manifest) -> bool:
        """Whether the version exists and is intact; a damaged one is published again."""
        text = self._read_text(target / MANIFEST)
        if text is None:
            return False
        try:
            if Manifest.from_json(text, target / MANIFEST).content_hash != manifest.content_hash:
                return False
            if self._local:
                verify(Path(str(target)))
                return True
        except PipelineError:
            return False
        return all(
            (target / name).exists() and (target / name).stat().st_size == digest["size"]
            for name, digest in manifest.files.items()
        )

    def _upload(self, staging: Path, target: UPath | Path, manifest: Manifest) -> None:
        for name in manifest.files:
            assert isinstance(target, UPath)
            target.fs.put_file(str(staging / name), (target / name).path)
        self._write_text(target.parent, f"{manifest.version}/{MANIFEST}", manifest.to_json())

    def _download(self, source: UPath | Path, cached: Path) -> Path:
        with exclusive(cached.with_name(f".{cached.name}.lock")):
            return self._download_locked(source, cached)

    def _download_locked(self, source: UPath | Path, cached: Path) -> Path:
        text = self._read_text(source / MANIFEST)
        if text is None:
            raise PipelineError(f"no {MANIFEST} in {source}: expected a complete artifact; materialize it again")
        manifest = Manifest.from_json(text, source / MANIFEST)
        incoming = cached.with_name(f"{_INCOMING}{uuid.uuid4().hex}")
        if cached.is_dir():
            incoming.write_text(text)
            incoming.replace(cached / MANIFEST)
            try:
                verify(cached)
                return cached
            except PipelineError:
                shutil.rmtree(cached)  # a damaged copy is fetched again
        try:
            for name in manifest.files:
                (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                assert isinstance(source, UPath)
                try:
                    source.fs.get_file((source / name).path, str(incoming / name))
                except FileNotFoundError:
                    raise PipelineError(
                        f"{source / name} is missing, but its manifest lists it; materialize the asset again"
                    ) from None
            (incoming / MANIFEST).write_text(text)
            verify(incoming)
            incoming.rename(cached)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return cached

    def _versions(self, base: Path | UPath) -> list[tuple[str, Path | UPath]]:
        """Date and path of each version, newest first; the date is empty if this code cannot read the manifest.

        A folder without a manifest, perhaps one that is being written, is not a version.
        """
        versions: list[tuple[str, Path | UPath]] = []
        for path in base.iterdir() if base.exists() else ():
            text = self._read_text(path / MANIFEST) if path.name != LATEST else None
            if text is None or path.name.startswith("."):
                continue
            try:
                versions.append((Manifest.from_json(text, path / MANIFEST).created, path))
            except PipelineError:
                versions.append(("", path))
        return sorted(versions, key=lambda version: version[0], reverse=True)

    def _prune(self, base: Path | UPath) -> None:
        """Remove all but the newest versions, the latest, and those that a process is reading."""
        versions = self._versions(base)
        for _, path in versions[self._keep_versions :]:
            if path.name == (self._read_text(base / LATEST) or "").strip():
                continue
            if isinstance(path, UPath) and not self._local:
                with suppress(FileNotFoundError):  # another machine removed it first
                    path.fs.rm_file((path / MANIFEST).path)  # from here on it is not a version
                    path.fs.rm(path.path, recursive=True)
            else:
                with unread(Path(str(path))) as free:
                    if free:
                        _remove(Path(str(path)))

        if not self._local:
            whole = {LATEST, *(path.name for _, path in versions)}
            for path in base.iterdir():
                if isinstance(path, UPath) and path.name not in whole and is_abandoned(path, UPath(base / LATEST)):
                    path.fs.rm(path.path, recursive=True)

    def _read_text(self, path: Path | UPath) -> str | None:
        try:
            if isinstance(path, UPath) and not self._local:
                path.fs.invalidate_cache()  # another process may have written since the last listing
                content: bytes = path.fs.cat_file(path.path)  # in one request: an open file would expire
                return content.decode(errors="replace")
            return path.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def _write_text(self, base: Path | UPath, name: str, text: str) -> None:
        """Replace a small file below `base` in one step: a rename in a folder, a single PUT in an object store."""
        path = base / name
        if not self._local:
            path.write_text(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The temporary file is not inside a version: readers digest every file there.
        fresh = Path(str(base), f"{_FRESH}{uuid.uuid4().hex}")
        try:
            with fresh.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(str(path))
        finally:
            fresh.unlink(missing_ok=True)


def _is_version(name: str) -> bool:
    return len(name) == VERSION_DIGITS and set(name) <= set("0123456789abcdef")


def _publish_folder(staging: Path, target: Path) -> None:
    """Move to `target` atomically: one rename on the same file system, else a copy next to it and a rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = target.with_name(f"{_INCOMING}{uuid.uuid4().hex}")
    try:
        try:
            staging.rename(incoming)
        except OSError:  # another file system
            shutil.copytree(staging, incoming)
        if target.exists():
            _remove(target)  # damaged
        incoming.rename(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _remove(version: Path) -> None:
    """Remove a version atomically for readers; the next publication deletes the files that are left."""
    removed = version.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
    version.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _delete_leftovers(base: Path) -> None:
    """Delete the temporary files and folders of killed processes."""
    for kind in (_INCOMING, _REMOVED, _FRESH):
        for left in base.glob(f"{kind}*"):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
