"""The service as a container image: one asset for CPUs, one for GPUs, of the same Bento but for the device.

A code location of their own (`llm_assets.images`): the pipeline and everything downstream of a stage of it is
materialized without a container engine.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from llm_assets import checks
from llm_assets.assets import asset_arguments
from llm_assets.containers.context import labels, lay_out
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage.stage import stage


def build_container_image(device: str) -> dg.AssetsDefinition:
    """The asset `container_image_cpu` or `container_image_gpu`."""
    name = f"container_image_{device}"

    @dg.asset(**asset_arguments(name))
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
            started = time.monotonic()
            containers.require()
            packaged = json.loads((packaged_bento / "bento.json").read_text())
            made_of = lay_out(work.scratch / "context", bentos, packaged, work.experiment, device, log=work.log)
            base, base_id = containers.base(made_of.base_image, log=work.log)
            tag = made_of.tag(base_id)
            image = containers.find_image(tag)
            reused = image is not None
            if image is None:
                made_of.unpack(log=work.log)
                named = labels(made_of, model=packaged["model"], experiment=work.experiment, base=base)
                image = containers.build(tag, made_of.folder, base, named, log=work.log)
            inside, command = containers.look_into(tag), containers.run_command(tag, device)
            record = {"image": tag, **image, "bento": made_of.bento, "inside": inside, "run": command}
            (work.output / "image.json").write_text(json.dumps(record, indent=2) + "\n")
            shutil.copy(made_of.lock, work.output)
            seconds = round(time.monotonic() - started, 1)
            work.log(f"{tag}: {image['bytes'] / 1e9:.2f} GB, {'found' if reused else 'built'} in {seconds} s")
            work.log(f"run it: {command}")
            yield work.result(
                {
                    "image": tag,
                    "image_bytes": image["bytes"],
                    "layers": image["layers"],
                    "build_seconds": seconds,
                    "labels": dg.MetadataValue.json(image["labels"]),
                    "run": dg.MetadataValue.md(f"`{command}`"),
                    "torch": inside["torch"],
                    "bento": made_of.bento,
                    "reused": reused,
                },
                checks.of_image(name, device, inside, image["bytes"]),
            )

    return container_image


container_image_cpu, container_image_gpu = (build_container_image(device) for device in ("cpu", "gpu"))
