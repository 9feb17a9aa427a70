"""Passes artifacts between assets: publishes the output of a stage and loads verified folders.

A stage returns its sealed directory (`manifest.seal`). If it is below the scratch folder, its workspace, the
directory's parent, is deleted after the version is published.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from llm_assets.artifacts.store import ArtifactStore
from llm_assets.failures import no_retry_after_termination, permanent_failures
from llm_assets.paths import shown_path, var_dir


@dataclass(frozen=True)
class Staged:
    """A sealed directory to publish.

    on_failure: called if that fails, as Dagster tells the asset too late. after_publishing: called once that is done.
    """

    path: Path
    on_failure: Callable[[BaseException], None]
    after_publishing: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Reused:
    """An already published version."""

    path: str
    version: str


ArtifactDirectory = dg.DagsterType(
    name="ArtifactDirectory",
    type_check_fn=lambda _, value: isinstance(value, Staged | Reused),
    description="A directory with a manifest.",
)


def scratch_dir() -> Path:
    """Workspaces of stages: `<asset>/<experiment>/<key>/`, on the disk of the default artifact root."""
    return var_dir() / "scratch"


def remote_scratch(workspace: Path) -> str:
    """URL of the copy of a workspace below LLM_ASSETS_CHECKPOINTS; empty if that is not set."""
    url = os.environ.get("LLM_ASSETS_CHECKPOINTS", "").rstrip("/")
    return f"{url}/{workspace.relative_to(scratch_dir()).as_posix()}" if url else ""


class DirectoryIOManager(dg.ConfigurableIOManager):
    """Immutable, content-addressed artifact directories in a folder or an object store."""

    root: str = Field(
        default="",
        description="Folder or fsspec URL (s3://bucket/prefix) of the artifacts. Empty: LLM_ASSETS_ARTIFACTS, else "
        "var/artifacts.",
    )
    cache_dir: str = Field(
        default="", description="Local copies of a remote root's artifacts. Empty: var/cache. Safe to delete."
    )
    keep_versions: int = Field(default=3, ge=1, description="Versions kept of each asset of each experiment.")

    def store(self) -> ArtifactStore:
        """The store that the fields describe."""
        return ArtifactStore.default(self.root, self.cache_dir, self.keep_versions)

    def handle_output(self, context: dg.OutputContext, obj: Staged | Reused) -> None:
        """Publish a sealed directory, or name a version that is reused."""
        if isinstance(obj, Reused):
            context.add_output_metadata(_metadata(obj.path, obj.version, unchanged=True))
            return
        with no_retry_after_termination(context):
            try:
                with permanent_failures():
                    publication = self.store().publish(obj.path)
            except BaseException as error:
                obj.on_failure(error)
                raise
        context.add_output_metadata(_metadata(publication.path, publication.version, unchanged=publication.unchanged))
        if publication.unchanged:
            context.log.info(f"unchanged: {publication.path} already had this content")
        if not publication.latest:
            context.log.warning(f"{publication.path} failed a blocking check: the latest good version stays the latest")
        if obj.path.is_relative_to(scratch_dir()):
            shutil.rmtree(obj.path.parent, ignore_errors=True)
        obj.after_publishing()

    def load_input(self, context: dg.InputContext) -> Path:
        """The verified local folder of the upstream's latest version."""
        with no_retry_after_termination(context), permanent_failures():
            return self.store().load(context.asset_key.path[-1], context.partition_key)


def _metadata(path: Path | str, version: str, *, unchanged: bool) -> dict[str, Any]:
    """Where a version is. The Overview has no room for the path, and leaves out what has Dagster's name for it."""
    return {"dagster/uri": dg.MetadataValue.path(shown_path(path)), "version": version, "unchanged": unchanged}
