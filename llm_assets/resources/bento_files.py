"""Bentos beside the artifacts of an object store: whole, with their model, for machines that did not build them.

BentoML's own stores are folders of one machine. With a remote root of artifacts, `packaged_bento` also publishes the
Bento as files that `bentoml serve FOLDER` takes, below `<root>/bento_files/<experiment>/`, by the rules of artifacts:
the manifest last, LATEST by a conditional write, every digest verified, old versions removed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_assets.artifacts.manifest import Manifest, refresh_command, seal
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.resources.bentos import BentoBuilder
from model.errors import PipelineError
from model.progress import Log, silent

BENTO_FILES = "bento_files"


def publish(
    store: ArtifactStore,
    bentos: BentoBuilder,
    bento: Mapping[str, Any],
    experiment: str,
    folder: Path,
    log: Log = silent,
) -> None:
    """Publish a Bento of BentoML's store, unless `store` is a folder of this machine or has it.

    bento: as `BentoBuilder.build_once` returns it. folder: new, for a copy of its files.
    """
    tag = bento["tag"]
    if not store.is_remote or published_tag(store, experiment) == tag:
        return
    log(f"publishing {tag} below {store.root / BENTO_FILES}")
    bentos.export(tag, folder, log=log)
    seal(
        folder,
        asset=BENTO_FILES,
        experiment=experiment,
        config={"bento": tag},
        code_version="1",
        upstream={},
        mlflow_run_id=None,
        dagster_run_id="",
    )
    store.publish(folder)


def published_tag(store: ArtifactStore, experiment: str) -> str:
    """The tag of the latest published Bento; empty if there is none."""
    manifest = store.latest_manifest(BENTO_FILES, experiment)
    return str(manifest.config["bento"]) if manifest else ""


def fetch(store: ArtifactStore, tag: str, experiment: str) -> Path:
    """The verified local folder of a published Bento. Raises PipelineError if it is not the latest one there."""
    found = published_tag(store, experiment)
    if found == tag:
        folder = store.load(BENTO_FILES, experiment)
        found = str(Manifest.read(folder).config["bento"])  # another may have been published meanwhile
        if found == tag:
            return folder
    raise PipelineError(
        f"{store.root / BENTO_FILES / experiment} has {found or 'no Bento'}, expected {tag}; package it again: "
        f"{refresh_command('packaged_bento', experiment)}"
    )
