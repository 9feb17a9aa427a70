"""The service as a container image: one asset for CPUs and one for GPUs, from the same Bento except for the device.

They are in a separate code location (`llm_assets.images`), so that the pipeline needs no container engine.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg

from llm_assets.artifacts.manifest import Manifest
from llm_assets.assets import asset_arguments, checks
from llm_assets.containers.image import ImageSource
from llm_assets.paths import output_folder
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage


def build_container_image(device: str) -> dg.AssetsDefinition:
    """The asset `container_image_cpu` or `container_image_gpu`."""
    name = f"container_image_{device}"

    def outdated(path: Path, arguments: Mapping[str, Any]) -> str:
        """Why the engine does not have the image of the present source, packages and base image."""
        packaged = _read(arguments["packaged_bento"] / "bento.json")
        experiment = Manifest.read(path).experiment
        source = ImageSource(arguments["containers"], arguments["bentos"], packaged, experiment, device)
        with TemporaryDirectory(dir=output_folder("scratch")) as workspace:
            return source.why_outdated(_read(path / "image.json"), Path(workspace))

    @dg.asset(**asset_arguments(name))
    @reuses_unchanged(outdated=outdated)
    def container_image(
        context: dg.AssetExecutionContext,
        hydra: HydraConfig,
        mlflow: MlflowTracking,
        bentos: BentoBuilder,
        containers: ContainerEngine,
        trained_checkpoint: Path,
        packaged_bento: Path,
    ) -> Iterator[dg.MaterializeResult]:
        upstream = {"trained_checkpoint": trained_checkpoint, "packaged_bento": packaged_bento}
        with stage(context, hydra, mlflow, upstream) as work:
            packaged = _read(packaged_bento / "bento.json")
            source = ImageSource(containers, bentos, packaged, work.experiment, device)
            image = source.build(work.scratch, work.output, log=work.log)
            yield work.result(
                {
                    "summary": ui_metadata.summary(
                        image=image.tag,
                        size=ui_metadata.size(image.bytes),
                        layers=f"{image.layers}",
                        torch=image.inside["torch"],
                    ),
                    "picture": ui_metadata.bars(
                        "bytes", {"image": image.bytes, "weights": packaged["model_bytes"]}, "bytes"
                    ),
                    "image": image.tag,
                    "image_bytes": image.bytes,
                    "layers": image.layers,
                    "build_seconds": image.seconds,
                    "labels": dg.MetadataValue.json(image.labels),
                    "run": dg.MetadataValue.md(f"`{image.run}`"),
                    "torch": image.inside["torch"],
                    "bento": image.bento,
                    "licenses": dg.MetadataValue.json(image.licenses),
                    "reused": image.reused,
                },
                checks.of_image(name, device, image.engine, image.inside, image.bytes),
            )

    return container_image


container_image_cpu, container_image_gpu = (build_container_image(device) for device in ("cpu", "gpu"))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
