"""The service with its model, ready to run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.artifacts.manifest import Manifest
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.assets import asset_arguments, checks
from llm_assets.registry import model_name
from llm_assets.resources import bento_files
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.evidence import served_model
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage


def outdated(path: Path, arguments: Mapping[str, Any]) -> str:
    """Why BentoML's stores, or the object store of artifacts, do not have the Bento of the present source."""
    bentos, record = arguments["bentos"], json.loads((path / "bento.json").read_text())
    tag = bentos.tag(record["bento"].partition(":")[0], record["arguments"])
    if tag != record["bento"]:
        return f"the service's source has changed since {record['bento']}"
    if missing := bentos.find_missing(tag, record["model"]):
        return f"BentoML's store has no {missing}"
    store, experiment = ArtifactStore.default(), Manifest.read(path).experiment
    if store.is_remote and bento_files.published_tag(store, experiment) != tag:
        return f"{store.root} has no files of {tag}"
    return ""


@dg.asset(**asset_arguments("packaged_bento"))
@reuses_unchanged(outdated=outdated)
def packaged_bento(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    bentos: BentoBuilder,
    trained_checkpoint: Path,
    quantized_model: Path,
    benchmark_report: Path,
) -> Iterator[dg.MaterializeResult]:
    """The served model in BentoML's model store, and a Bento built from `bento/`, both versioned by their content.

    The artifact is `bento.json`: the tags, their sizes and the command that serves the Bento. With artifacts in an
    object store, the Bento's files are published there, too.
    """
    upstream = {
        "trained_checkpoint": trained_checkpoint,
        "quantized_model": quantized_model,
        "benchmark_report": benchmark_report,
    }
    with stage(context, hydra, mlflow, upstream) as work:
        serving = work.settings.serving
        served = served_model(work.settings)
        labels = {"experiment": work.experiment, "asset": served, "config_hash": work.upstream[served].config_hash[:16]}
        bento, model = bentos.package(
            model_name(work.experiment), upstream[served], work.upstream[served].version, serving, labels, log=work.log
        )
        bento_files.publish(
            ArtifactStore.default(), bentos, bento, work.experiment, work.scratch / "files", log=work.log
        )
        command = f"bentoml serve {bento['tag']}"
        if serving.engine == "vllm":  # `make vllm` makes its environment; an image has it
            command = f"REX_VLLM_PYTHON=.venv-vllm/bin/python {command}"
        record = {
            "bento": bento["tag"],
            "bento_bytes": bento["bytes"],
            "model": model["tag"],
            "model_bytes": model["bytes"],
            "serve": command,
            "arguments": bento["arguments"],
        }
        (work.output / "bento.json").write_text(json.dumps(record, indent=2) + "\n")
        work.log(f"serve it: {command}")
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    Bento=bento["tag"], size=ui_metadata.size(bento["bytes"]), weights=ui_metadata.size(model["bytes"])
                ),
                "picture": ui_metadata.bars(
                    "bytes", {"code and page": bento["bytes"], "weights": model["bytes"]}, "bytes"
                ),
                "bento": bento["tag"],
                "model": model["tag"],
                "serve": dg.MetadataValue.md(f"`{command}`"),
                "bento_bytes": bento["bytes"],
                "model_bytes": model["bytes"],
                "reused": not bento["created"],
            },
            [checks.is_in_store(bento, model)],
        )
