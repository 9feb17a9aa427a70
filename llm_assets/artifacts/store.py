"""Published artifacts: immutable versions and the pointer to the latest, in a folder or an object store.

    <root>/<asset>/<experiment>/<first 16 digits of the content hash>/...   manifest.json is written last
    <root>/<asset>/<experiment>/LATEST                                      the version's name, swapped in one step

A reader goes pointer -> manifest -> every digest. The root is a folder or anything that fsspec opens by URL; versions
of a remote root are read through a local cache. No Dagster here: `io_managers` calls it.
"""

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from llm_assets.artifacts.manifest import Manifest, refresh_command
from model.artifact import MANIFEST, verify
from model.errors import PipelineError, full_disk_as_error

LATEST = "LATEST"


@dataclass(frozen=True)
class Publication:
    """Location of a version; `unchanged`: its content had been published before."""

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

    def publish(self, staging: Path) -> Publication:
        """Make a sealed directory a version, and the latest one unless it failed a blocking check.

        `staging` may be moved. The previous version stays whole whatever happens on the way.
        Raises PipelineError for a directory without a manifest and for a full disk.
        """
        with full_disk_as_error(Path(str(self.root)) if self._local else staging):
            return self._publish(staging, Manifest.read(staging))

    def _publish(self, staging: Path, manifest: Manifest) -> Publication:
        base = self.root / manifest.asset / manifest.experiment
        target = base / manifest.version
        unchanged = self._is_whole(target, manifest)
        if unchanged:
            # Same content from another run: only its provenance is new.
            self._write_text(target / MANIFEST, manifest.to_json())
        elif self._local:
            _publish_folder(staging, Path(str(target)))
        else:
            self._upload(staging, target, manifest)
        latest = not manifest.failed_checks
        if latest:
            self._write_text(base / LATEST, manifest.version + "\n")
        self._prune(base)
        return Publication(str(target), manifest.version, unchanged, latest)

    def latest_manifest(self, asset: str, experiment: str) -> Manifest | None:
        """The manifest of the latest version; None if it is missing or unreadable."""
        base = self.root / asset / experiment
        version = self._read_text(base / LATEST)
        text = self._read_text(base / version.strip() / MANIFEST) if version else None
        if text is None:
            return None
        try:
            return Manifest.from_json(text, base)
        except PipelineError:
            return None

    def load(self, asset: str, experiment: str) -> Path:
        """The verified local folder of the latest version.

        Raises PipelineError naming the path where there is none, or where a file is missing or altered.
        """
        base = self.root / asset / experiment
        version = self._read_text(base / LATEST)
        if version is None:
            raise PipelineError(
                f"no {asset} of experiment {experiment!r} in {base}; materialize it: "
                f"{refresh_command(asset, experiment)}"
            )
        source = base / version.strip()
        if isinstance(source, Path) and self._local:
            verify(source)
            return source
        return self._download(source, self._cache_dir / asset / experiment / version.strip())

    def _is_whole(self, target: Path | UPath, manifest: Manifest) -> bool:
        """Whether the version is there and sound; a damaged one is published again."""
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
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            assert isinstance(target, UPath)
            target.fs.put_file(str(staging / name), (target / name).path)
        self._write_text(target / MANIFEST, manifest.to_json())

    def _download(self, source: UPath | Path, cached: Path) -> Path:
        text = self._read_text(source / MANIFEST)
        if text is None:
            raise PipelineError(f"no {MANIFEST} in {source}: expected a complete artifact; materialize it again")
        manifest = Manifest.from_json(text, source / MANIFEST)
        if cached.is_dir():
            (cached / MANIFEST).write_text(text)
            try:
                verify(cached)
                return cached
            except PipelineError:
                shutil.rmtree(cached)  # a damaged copy is fetched again
        incoming = cached.with_name(f".incoming-{uuid.uuid4().hex}")
        try:
            for name in manifest.files:
                (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                assert isinstance(source, UPath)
                try:
                    source.fs.get_file((source / name).path, str(incoming / name))
                except FileNotFoundError:
                    raise PipelineError(
                        f"{source / name} is missing, its manifest lists it; materialize the asset again"
                    ) from None
            (incoming / MANIFEST).write_text(text)
            verify(incoming)
            incoming.rename(cached)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return cached

    def _prune(self, base: Path | UPath) -> None:
        """Remove all but the newest versions; a folder without a manifest may be one on its way and stays."""
        latest = (self._read_text(base / LATEST) or "").strip()
        versions: list[tuple[str, Path | UPath]] = []
        for path in base.iterdir():
            text = self._read_text(path / MANIFEST) if path.name != LATEST else None
            if text is not None and not path.name.startswith("."):
                versions.append((Manifest.from_json(text, path / MANIFEST).created, path))
        newest_first = sorted(versions, key=lambda version: version[0], reverse=True)
        for _, path in newest_first[self._keep_versions :]:
            if path.name == latest:
                continue
            if isinstance(path, UPath) and not self._local:
                path.fs.rm(path.path, recursive=True)
            else:
                shutil.rmtree(str(path))

    def _read_text(self, path: Path | UPath) -> str | None:
        if isinstance(path, UPath) and not self._local:
            path.fs.invalidate_cache()  # another process may have written since the last listing
        try:
            return path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write_text(self, path: Path | UPath, text: str) -> None:
        """Replace a small file in one step: a rename in a folder, a single PUT in an object store."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._local:
            path.write_text(text)
            return
        fresh = Path(f"{path}.{uuid.uuid4().hex}")
        try:
            with fresh.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(str(path))
        finally:
            fresh.unlink(missing_ok=True)


def _publish_folder(staging: Path, target: Path) -> None:
    """Let `target` appear whole: one rename on one file system, else a copy beside it and a rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = target.with_name(f".incoming-{uuid.uuid4().hex}")
    try:
        try:
            staging.rename(incoming)
        except OSError:  # another file system
            shutil.copytree(staging, incoming)
        if target.exists():  # a damaged version makes room
            target.rename(target.with_name(f".damaged-{uuid.uuid4().hex}"))
        incoming.rename(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        for damaged in target.parent.glob(".damaged-*"):
            shutil.rmtree(damaged, ignore_errors=True)
