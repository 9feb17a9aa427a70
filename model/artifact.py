"""Digests of an artifact's files, verified before anything is read from its directory.

`manifest.json`, written last, lists the files; the pipeline and the service call `verify` before they trust a
directory. The manifest's other fields (configuration, upstream versions, tracking run) belong to the orchestrator.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from model.errors import PipelineError, json_type, not_json

MANIFEST = "manifest.json"


class FileDigest(TypedDict):
    """One file of an artifact."""

    sha256: str
    size: int


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises PipelineError, which ends with `advice`, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise PipelineError(f"{path} is missing: expected a model directory; {advice}") from None
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not JSON ({not_json(error)}): expected a JSON object; {advice}") from None
    if not isinstance(found, dict):
        raise PipelineError(f"{path} holds a {json_type(found)}: expected a JSON object; {advice}")
    return found


def write_json(path: Path, value: object, *, sort_keys: bool = False) -> None:
    """Write one of an artifact's JSON files, readable, in UTF-8; equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n", encoding="utf-8")


def file_digests(directory: Path) -> dict[str, FileDigest]:
    """Digest of every file below `directory` but the manifest, keyed by posix path relative to it, sorted."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    digests: dict[str, FileDigest] = {}
    for path in paths:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digests[path.relative_to(directory).as_posix()] = {"sha256": sha256, "size": path.stat().st_size}
    return digests


def content_hash(digests: dict[str, FileDigest]) -> str:
    """Hash of an artifact's content, 64 hex digits: over each relative path and its file's sha256, in path order."""
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(name.encode() + b"\0" + digests[name]["sha256"].encode() + b"\n")
    return total.hexdigest()


def read_origin(directory: Path) -> dict[str, Any] | None:
    """What the manifest says about an artifact's origin: settings, upstream versions and runs, but not its files.

    None without a manifest.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    return {name: value for name, value in _read_manifest(manifest).items() if name != "files"}


def parse_manifest(text: str, source: object) -> dict[str, Any]:
    """The fields of a manifest, whose files are checked. Raises PipelineError naming `source` for anything else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{source} is not a manifest ({not_json(error)}); {_AGAIN}") from error
    files = fields.get("files") if isinstance(fields, dict) else None
    if not isinstance(files, dict) or not files or not all(map(_is_digest, files.values())):
        raise PipelineError(f"{source} is not a manifest (it lists no files with size and sha256); {_AGAIN}")
    if fields.get("content_hash", content_hash(files)) != content_hash(files):
        raise PipelineError(f"{source} was altered: its content_hash is not that of the files that it lists; {_AGAIN}")
    return fields


_AGAIN = "make the artifact again"


def _is_digest(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("sha256"), str) and isinstance(value.get("size"), int)


def _read_manifest(manifest: Path) -> dict[str, Any]:
    return parse_manifest(manifest.read_text(errors="replace"), manifest)


def verify(directory: Path) -> None:
    """Check every file that the manifest lists.

    Raises PipelineError naming the path if the manifest or a file is missing or a file was altered.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise PipelineError(f"no {MANIFEST} in {directory}: expected a complete artifact; make it again")
    expected: dict[str, FileDigest] = _read_manifest(manifest)["files"]
    found = file_digests(directory)
    for name, digest in expected.items():
        if name not in found:
            raise PipelineError(f"{directory / name} is missing, but its manifest lists it; make the artifact again")
        if found[name] != digest:
            raise PipelineError(
                f"{directory / name} was altered: sha256 {found[name]['sha256'][:12]}, its manifest says "
                f"{digest['sha256'][:12]}; make the artifact again"
            )
