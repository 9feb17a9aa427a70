"""Versions of registered models. Content that is already registered gets no second version.

`promotion.py` decides which version is champion.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_assets.versions.mlflow_model import FOLDER, is_model, write_mlflow_model
from llm_assets.versions.promotion import DECISION, NO_CONTEST, Contest, decide_again, decide_champion, decision_of
from model.progress import Log

if TYPE_CHECKING:
    from mlflow import MlflowClient


def register_version(
    client: "MlflowClient",
    run_id: str,
    name: str,
    model_dir: Path,
    *,
    asset: str,
    bits_per_byte: float,
    evaluation_text: str,
    candidate: bool,
    content_hash: str,
    log: Log,
    contest: Contest = NO_CONTEST,
    objections: Sequence[str] = (),
) -> str:
    """Register a model directory as a version of `name` unless its content is registered; returns the version number.

    candidate: whether this model is of the kind that is served, full precision or quantized: a quantized model never
    beats the one it was made from. evaluation_text identifies the text that the bits per byte were measured on.
    content_hash: of the artifact; if empty, a version is always added. objections: see `decide_champion`.
    The version holds its own copy of the directory: the artifact store keeps only the newest versions, and a tracking
    server refuses local paths. Beside it are the files that MLflow's flavors load a model by (`mlflow_model.py`).
    """
    _create_model(client, name)
    versions = all_versions(client, name)
    version = _with_content(versions, asset, content_hash)
    if version is None:
        client.log_artifacts(run_id, str(model_dir), FOLDER)
        if is_model(model_dir):
            with tempfile.TemporaryDirectory() as folder:
                write_mlflow_model(model_dir, Path(folder), run_id=run_id)
                client.log_artifacts(run_id, folder, FOLDER)
        source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
        tags = {"asset": asset, "bits_per_byte": repr(bits_per_byte), "evaluation_text": evaluation_text}
        tags |= {"content_hash": content_hash} if content_hash else {}
        version = client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)
        versions.append(version)
    else:
        log(f"{name} version {version.version} already has this content: no version is added")
    if candidate and DECISION not in version.tags:  # decided only once: a person may have rolled back since
        decide_champion(client, name, version, versions, contest, objections=objections, log=log)
    return str(version.version)


def add_measurements(
    client: "MlflowClient",
    name: str,
    asset: str,
    content_hash: str,
    found: Mapping[str, str],
    *,
    contest: Contest = NO_CONTEST,
    log: Log,
) -> dict[str, Any]:
    """Tag the version of an artifact's content with what a later stage measured of it, and decide on it again.

    found: see `measurements`; nothing happens if the version has the same tags. Returns the decision (`decision_of`);
    empty if the content is not registered.
    """
    versions = all_versions(client, name)
    version = _with_content(versions, asset, content_hash)
    if version is None:
        return {}
    new = {tag: value for tag, value in found.items() if version.tags.get(tag) != value}
    if new:
        for tag, value in new.items():
            client.set_model_version_tag(name, str(version.version), tag, value)
        version = client.get_model_version(name, str(version.version))
        decide_again(client, name, version, versions, contest, log)
        version = client.get_model_version(name, str(version.version))
    return decision_of(version)


def find_decision(client: "MlflowClient", name: str, asset: str, content_hash: str) -> dict[str, Any]:
    """The recorded decision on an artifact's content (`decision_of`); empty if it is not registered or not decided."""
    version = _with_content(all_versions(client, name), asset, content_hash)
    return decision_of(version) if version else {}


def is_registered(client: "MlflowClient", name: str, asset: str, content_hash: str) -> bool:
    """Whether an artifact's content is a version of the registered model `name`."""
    return _with_content(all_versions(client, name), asset, content_hash) is not None


def _with_content(versions: list[Any], asset: str, content_hash: str) -> Any:
    wanted = (content_hash, asset)
    found = (known for known in versions if (known.tags.get("content_hash"), known.tags.get("asset")) == wanted)
    return next(found, None) if content_hash else None


def _create_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def all_versions(client: "MlflowClient", name: str) -> list[Any]:
    """All versions of a registered model, unordered; empty for an unknown model."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found
