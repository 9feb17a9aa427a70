"""Prints where an experiment's newest artifacts are and how to serve its model.

python -m llm_assets.latest [EXPERIMENT]           the artifacts, the report and the command that serves
python -m llm_assets.latest [EXPERIMENT] --bento   the Bento's tag, or its folder from an object store
python -m llm_assets.latest [EXPERIMENT] --image cpu   the tag of the container image alone (or gpu)
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_assets.artifacts.manifest import refresh_command
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.experiments.compose import DEFAULT_EXPERIMENT
from llm_assets.paths import shown_path
from llm_assets.registry import PIPELINE
from model.errors import PipelineError, ends_in_one_line

SPLITS = ("train", "validation")
STAGES = [stage.name for stage in PIPELINE]


def latest_artifacts(experiment: str) -> dict[str, Path]:
    """The verified folder of each asset's newest version, in the order of the pipeline.

    Raises PipelineError if one is missing.
    """
    store = ArtifactStore.default()
    return {asset: store.load(asset, experiment) for asset in STAGES}


def results(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """The headline results of a model by name, as rounded numbers with units."""

    def read(asset: str, name: str = "summary.json") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((artifacts[asset] / name).read_text())
        return found

    corpus, trained, quantized = read("corpus"), read("trained_checkpoint"), read("quantized_model")
    report = read("benchmark_report", "report.json")["summary"]
    return {
        "text": f"{sum(corpus[f'{split}_documents'] for split in SPLITS):,} documents, "
        f"{sum(corpus[f'{split}_bytes'] for split in SPLITS) / 1e6:,.1f} MB",
        "parameters": f"{trained['parameters']:,}",
        "steps": f"{trained['steps']:,}",
        "bits per byte, validation split": f"{trained['bits_per_byte']:.4f}",
        f"bits per byte, {quantized['evaluated_tokens']:,} tokens": f"{quantized['bits_per_byte_before']:.4f}"
        f", {quantized['bits_per_byte_after']:.4f} {quantized['method']}",
        "weights": f"{quantized['bytes_before'] / 1e6:,.2f} MB, {quantized['bytes_after'] / 1e6:,.2f} MB "
        f"{quantized['method']}",
        "decoding, tokens/s": f"{report['decode_tokens_per_second']:,.0f}, "
        f"{report['decode_tokens_per_second_quantized']:,.0f} {quantized['method']}",
        "with the KV cache": f"{report['kv_cache_speedup']:.1f} times as fast",
    }


def bento_tag(experiment: str) -> str:
    """What `bentoml serve` takes: the tag of the experiment's newest Bento, or a folder fetched from the object store.

    Raises PipelineError if neither BentoML's store nor the object store has it.
    """
    store = ArtifactStore.default()
    record = store.load("packaged_bento", experiment) / "bento.json"
    tag: str = json.loads(record.read_text())["bento"]
    bentos = Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml") / "bentos"
    if not (bentos / tag.replace(":", "/")).is_dir():
        if store.is_remote:
            from llm_assets.resources.bento_files import fetch

            return str(fetch(store, tag, experiment))
        raise PipelineError(
            f"no Bento {tag} in {bentos}, where BENTOML_HOME points; package it again: "
            f"{refresh_command('packaged_bento', experiment)}"
        )
    return tag


def image_tag(experiment: str, device: str) -> str:
    """The tag of the experiment's newest container image for `cpu` or `gpu`."""
    record = ArtifactStore.default().load(f"container_image_{device}", experiment) / "image.json"
    tag: str = json.loads(record.read_text())["image"]
    return tag


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print the requested locations; one line and status 1 for a missing artifact."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.latest", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", nargs="?", default=DEFAULT_EXPERIMENT, help=f"default: {DEFAULT_EXPERIMENT}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bento", action="store_true", help="print the Bento's tag, or its folder, alone")
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
        print(ArtifactStore.default().load(arguments.asset, arguments.experiment))
        return 0
    artifacts = latest_artifacts(arguments.experiment)
    for asset, path in artifacts.items():
        print(f"{asset:18} {shown_path(path)}")
    print()
    for name, value in results(artifacts).items():
        print(f"{name:34} {value}")
    experiment = "" if arguments.experiment == DEFAULT_EXPERIMENT else f" EXPERIMENT={arguments.experiment}"
    print(f"\nReport: {shown_path(artifacts['benchmark_report'] / 'report.md')}")
    print("View:   make ui")
    print(f"Serve:  make serve{experiment}")
    print(f"        bentoml serve {bento_tag(arguments.experiment)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
