"""Says where an experiment's newest artifacts are and how to serve its model.

python -m llm_assets.latest [EXPERIMENT]           the artifacts, the report and the command that serves
python -m llm_assets.latest [EXPERIMENT] --bento   the Bento's tag alone, for scripts
python -m llm_assets.latest [EXPERIMENT] --image cpu   the tag of the container image alone (or gpu)
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.artifacts.manifest import refresh_command
from llm_assets.experiments.compose import DEFAULT_EXPERIMENT
from llm_assets.registry import PIPELINE
from model.errors import PipelineError, ends_in_one_line

STAGES = [stage.name for stage in PIPELINE]


def latest_artifacts(experiment: str) -> dict[str, Path]:
    """The verified folder of each asset's newest version, in the order of the pipeline; PipelineError for a missing
    one.
    """
    store = DirectoryIOManager().store()
    return {asset: store.load(asset, experiment) for asset in STAGES}


def bento_tag(experiment: str) -> str:
    """The tag of the experiment's newest Bento; PipelineError where BentoML's store has lost it."""
    record = DirectoryIOManager().store().load("packaged_bento", experiment) / "bento.json"
    tag: str = json.loads(record.read_text())["bento"]
    bentos = Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml") / "bentos"
    if not (bentos / tag.replace(":", "/")).is_dir():
        raise PipelineError(
            f"no Bento {tag} in {bentos}, where BENTOML_HOME points; package it again: "
            f"{refresh_command('packaged_bento', experiment)}"
        )
    return tag


def image_tag(experiment: str, device: str) -> str:
    """The tag of the experiment's newest container image for `cpu` or `gpu`."""
    record = DirectoryIOManager().store().load(f"container_image_{device}", experiment) / "image.json"
    tag: str = json.loads(record.read_text())["image"]
    return tag


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print what was asked for; one line and status 1 where an artifact is missing."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.latest", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", nargs="?", default=DEFAULT_EXPERIMENT, help=f"default: {DEFAULT_EXPERIMENT}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bento", action="store_true", help="print the Bento's tag alone")
    only.add_argument("--image", choices=("cpu", "gpu"), help="print the container image's tag alone")
    only.add_argument("--asset", choices=STAGES, help="print this artifact's folder alone")
    arguments = parser.parse_args(argv)
    if arguments.bento:
        print(bento_tag(arguments.experiment))
        return 0
    if arguments.image:
        print(image_tag(arguments.experiment, arguments.image))
        return 0
    if arguments.asset:
        print(DirectoryIOManager().store().load(arguments.asset, arguments.experiment))
        return 0
    artifacts = latest_artifacts(arguments.experiment)
    for asset, path in artifacts.items():
        print(f"{asset:18} {path}")
    experiment = "" if arguments.experiment == DEFAULT_EXPERIMENT else f" EXPERIMENT={arguments.experiment}"
    print(f"\nReport: {artifacts['benchmark_report'] / 'report.md'}")
    print(f"Serve:  make serve{experiment}    (bentoml serve {bento_tag(arguments.experiment)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
