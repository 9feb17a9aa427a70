"""The provenance of an MLflow run: the description, source, commit, user and datasets on MLflow's page.

The description links to the run in Dagster. Its address is LLM_ASSETS_DAGSTER_URL, which `make ui` sets, else
http://127.0.0.1:3001.
"""

import functools
import getpass
import json
import os
from collections.abc import Mapping

from llm_assets.artifacts.manifest import Manifest
from llm_assets.registry import stage_spec
from model.system.revision import git

POINT_TAG = "rex/point"
"""Run tag with the number of a sweep's point."""
DAGSTER_URL = "LLM_ASSETS_DAGSTER_URL"
_DIGEST_CHARACTERS = 36  # MLflow's limit


def dagster_address() -> str:
    """The address of Dagster's UI."""
    return (os.environ.get(DAGSTER_URL) or "http://127.0.0.1:3001").rstrip("/")


def source_tags(asset: str, partition: str, dagster_run_id: str, description: str = "") -> dict[str, str]:
    """Tags of the run that materializes `asset`; unknown ones (a commit, a user) are left out."""
    link = f"[Run {dagster_run_id[:8]} in Dagster]({dagster_address()}/runs/{dagster_run_id})"
    tags = {
        "mlflow.note.content": "\n\n".join(filter(None, [f"`{asset}` of `{partition}`", description, link])),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": _source(asset),
        "mlflow.source.git.commit": _commit(),
        "mlflow.user": _user(),
    }
    return {name: value for name, value in tags.items() if value}


def inputs(upstream: Mapping[str, Manifest]) -> list[dict[str, str]]:
    """The artifacts that a run reads, as MLflow's datasets. The source names the version in the artifact store."""
    return [
        {
            "name": f"{name} of {manifest.experiment}",
            "digest": manifest.content_hash[:_DIGEST_CHARACTERS],
            "source_type": "artifact",
            "source": json.dumps({"asset": name, "experiment": manifest.experiment, "version": manifest.version}),
        }
        for name, manifest in upstream.items()
    ]


def _source(asset: str) -> str:
    try:
        module = stage_spec(asset).module or f"llm_assets.assets.{asset}"
    except KeyError:  # an asset of another code location
        return ""
    return module.replace(".", "/") + ".py"


@functools.cache
def _commit() -> str:
    return git("rev-parse", "HEAD")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        return ""
