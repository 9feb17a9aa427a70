"""Code versions: hashes of an asset's source files; a change makes its artifacts stale."""

import hashlib

import dagster as dg

from llm_assets.paths import REPOSITORY
from llm_assets.registry import stage_spec


def code_digest(asset: str) -> str:
    """Hash of the Python files behind an asset: `model/`, the stage's module and the registry's folders."""
    spec = stage_spec(asset)
    module = spec.module or f"llm_assets.assets.{asset}"
    files = {REPOSITORY / f"{module.replace('.', '/')}.py"}
    for folder in ("model", *spec.code):
        files |= set((REPOSITORY / folder).rglob("*.py"))
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes() + b"\n")
    return total.hexdigest()


def code_version(context: dg.AssetExecutionContext) -> str:
    """The code version that the running asset declares."""
    return context.assets_def.code_versions_by_key[context.asset_key] or "0"
