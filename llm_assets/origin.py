"""Prints where an answer of the service comes from: the model's version, dataset, settings and runs, as YAML.

    python -m llm_assets.origin smoke fp_3_native_int8

The second argument is the `system_fingerprint` of an answer, or the version in it: a number in MLflow's registry, or
the version of the model in a Bento. A running service answers the same at /server_info, as `origin`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llm_assets.registry import model_name
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.versions.mlflow_model import FOLDER
from llm_assets.versions.register import all_versions
from model.artifact import MANIFEST, read_origin
from model.errors import PipelineError, ends_in_one_line

MIN_DIGITS = 8
"""Of a content hash, to name a version by."""


def find_origin(experiment: str, fingerprint: str) -> dict[str, Any]:
    """The origin of a registered version of an experiment's model, with its number.

    Raises PipelineError if the fingerprint is not of such a version.
    """
    version = fingerprint.removeprefix("fp_").partition("_")[0]
    client, _ = MlflowTracking().client()
    name = model_name(experiment)
    versions = {str(known.version): known for known in all_versions(client, name)}
    by_content = (
        known
        for known in versions.values()
        if len(version) >= MIN_DIGITS and known.tags.get("content_hash", "").startswith(version)
    )
    found = versions.get(version) or next(by_content, None)
    if found is None:
        numbers = ", ".join(sorted(versions, key=int)) or "none"
        raise PipelineError(
            f"{fingerprint!r} is not of a registered version of {name} (registered: {numbers}): expected the "
            "system_fingerprint of an answer of this experiment's model"
        )
    with tempfile.TemporaryDirectory() as folder:
        manifest = client.download_artifacts(found.run_id, f"{FOLDER}/{MANIFEST}", folder)
        origin = read_origin(Path(manifest).parent) or {}
    return {"model": name, "version": str(found.version), **origin}


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print the origin; one line and status 1 if there is no such version."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.origin", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", help="as in configs/experiment/")
    parser.add_argument("fingerprint", help="`system_fingerprint` of an answer, or the version in it")
    given = parser.parse_args(argv)
    found = find_origin(given.experiment, given.fingerprint)
    print(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
