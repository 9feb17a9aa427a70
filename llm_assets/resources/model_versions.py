"""Versions of registered models, and which of them is champion.

A model whose content is registered already gets no second version. The alias `champion` moves by a decision that is
recorded on the version: to the first candidate, to one that is better than every other on the same text, or to the best
on a new text. An alias that a person moved (it differs from the last recorded decision) moves only to a version that is
better than every other on the champion's own text.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.progress import Log

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, DECIDED, DECISION = "champion", "champion_decided", "champion_decision"
"""The alias; the tag of a registered model with the version last decided on; the tag of a version with the reason."""


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
) -> str:
    """Register a model directory as a version of `name` unless its content is one; returns the version.

    candidate: whether this is the kind of model that is served, full precision or quantized: a quantized model never
    beats the one it was made from. evaluation_text identifies the text that the bits per byte were measured on.
    content_hash: of the artifact; empty: register in any case.
    The version holds its own copy of the directory: the artifact store keeps only the newest versions, and a tracking
    server refuses local paths.
    """
    _create_model(client, name)
    versions = _versions(client, name)
    version = _with_content(versions, asset, content_hash)
    if version is None:
        client.log_artifacts(run_id, str(model_dir), "model")
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        tags = {"asset": asset, "bits_per_byte": repr(bits_per_byte), "evaluation_text": evaluation_text}
        tags |= {"content_hash": content_hash} if content_hash else {}
        version = client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)
        versions.append(version)
    else:
        log(f"{name} version {version.version} has this content already: no version is added")
    if candidate and DECISION not in version.tags:  # what was decided once stays: a person may have gone back since
        _decide_champion(client, name, version, versions, log)
    return str(version.version)


def is_registered(client: "MlflowClient", name: str, asset: str, content_hash: str) -> bool:
    """Whether an artifact's content is a version of the registered model `name`."""
    return _with_content(_versions(client, name), asset, content_hash) is not None


def _with_content(versions: list[Any], asset: str, content_hash: str) -> Any:
    wanted = (content_hash, asset)
    found = (known for known in versions if (known.tags.get("content_hash"), known.tags.get("asset")) == wanted)
    return next(found, None) if content_hash else None


def _decide_champion(client: "MlflowClient", name: str, version: Any, versions: list[Any], log: Log) -> None:
    model = client.get_registered_model(name)
    current = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    if current == str(version.version):
        return
    champion = next((other for other in versions if str(other.version) == current), None)
    is_by_hand = model.tags.get(DECIDED) not in (None, current)
    bits = float(version.tags["bits_per_byte"])
    rivals = [
        other for other in versions if _kind(other) == _kind(version) and str(other.version) != str(version.version)
    ]
    better = [other for other in rivals if not bits < float(other.tags["bits_per_byte"])]
    promoted = math.isfinite(bits)
    if not promoted:
        reason = f"not promoted: {bits} bits per byte"
    elif better:
        best = min(better, key=lambda other: float(other.tags["bits_per_byte"]))
        promoted = False
        reason = (
            f"not promoted: {bits:.4f} bits per byte, version {best.version} has {_bits(best):.4f} on the same text"
        )
    elif champion is None and not is_by_hand:
        reason = f"promoted: the first candidate, {bits:.4f} bits per byte"
    elif champion is not None and _kind(champion) == _kind(version):
        reason = f"promoted: {bits:.4f} bits per byte, "
        reason += f"the champion, version {current}, has {_bits(champion):.4f} on the same text"
    elif is_by_hand:
        promoted = False
        reason = f"not promoted: a person set the champion ({current or 'none'}), and it was measured on another text"
    else:
        reason = f"promoted: {bits:.4f} bits per byte, "
        reason += f"the best on a text that the champion, version {current}, was not measured on"
    client.set_model_version_tag(name, str(version.version), DECISION, reason)
    if promoted:
        # The decision first: a process killed in between leaves an alias that the next run treats as set by hand.
        client.set_registered_model_tag(name, DECIDED, str(version.version))
        client.set_registered_model_alias(name, CHAMPION, str(version.version))
    log(f"{name} version {version.version}: {reason}")


def _kind(version: Any) -> tuple[str | None, str | None]:
    """What makes two versions comparable: the asset, and the text that they were measured on."""
    return version.tags.get("asset"), _evaluation_text(version.tags)


def _bits(version: Any) -> float:
    return float(version.tags["bits_per_byte"])


def _evaluation_text(tags: Mapping[str, str]) -> str | None:
    """The tag `evaluation_text` of a model version, or its name in older versions, `yardstick`."""
    return tags.get("evaluation_text", tags.get("yardstick"))


def _create_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: "MlflowClient", name: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found
