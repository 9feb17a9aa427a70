"""Builds the service's image for one device from a packaged Bento, and inspects it."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_assets.containers.context import ImageContext, labels, prepare_context
from llm_assets.resources import bill_of_materials
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from model.progress import Log, silent

BILL = f"/app/bento/env/python/{bill_of_materials.FILE}"
"""The bill of materials, in an image."""
VLLM_PYTHON = ("/app/vllm/bin/python", "-I")
"""The interpreter of vLLM's environment, in an image, without the service's packages."""


@dataclass(frozen=True)
class BuiltImage:
    """An image of the engine's store. inside: the result of `ContainerEngine.probe`. run: the command that starts it.

    engine: of the service. reused: an image of the same content already existed. licenses: number of packages per
    license.
    """

    tag: str
    bytes: int
    layers: int
    labels: dict[str, str]
    bento: str
    engine: str
    inside: dict[str, Any]
    run: str
    reused: bool
    licenses: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class ImageSource:
    """The inputs of one image build. packaged: a `bento.json`. device: `cpu` or `gpu`."""

    engine: ContainerEngine
    bentos: BentoBuilder
    packaged: Mapping[str, Any]
    experiment: str
    device: str

    def build(self, workspace: Path, output: Path, log: Log = silent) -> BuiltImage:
        """Build the image unless the engine has it; write its record, locks and bill of materials to `output`.

        workspace: a folder for the build context.
        Raises PipelineError if no engine answers or a build fails.
        """
        started = time.monotonic()
        context, base, tag = self._prepare(workspace, log)
        found = self.engine.find_image(tag)
        reused = found is not None
        if found is None:
            context.unpack(log=log)
            held = [part for one in context.environments for part in bill_of_materials.of_folder(one.folder)]
            held += bill_of_materials.of_base_image(self.engine.base_packages(base))
            name, version = tag.split(":")
            model = self.packaged["model"]
            bill_of_materials.write(context.bill, name=name, version=version, model=model, components=held)
            named = labels(context, model=model, experiment=self.experiment, base=base)
            found = self.engine.build(tag, context.folder, base, named, log=log)
        is_vllm = context.engine == "vllm"
        inside = self.engine.probe(tag, VLLM_PYTHON if is_vllm else ("python3",))
        run = self.engine.run_command(tag, self.device, memory="6g" if is_vllm else "2g")
        record = {"image": tag, **found, "bento": context.bento, "inside": inside, "run": run}
        (output / "image.json").write_text(json.dumps(record, indent=2) + "\n")
        for one in context.environments:
            shutil.copy(one.lock, output)
        bill = self.engine.read_file(tag, BILL)
        (output / bill_of_materials.FILE).write_text(bill)
        seconds = round(time.monotonic() - started, 1)
        log(f"{tag}: {found['bytes'] / 1e9:.2f} GB, {'found' if reused else 'built'} in {seconds} s")
        log(f"run it: {run}")
        return BuiltImage(
            tag,
            found["bytes"],
            found["layers"],
            found["labels"],
            context.bento,
            context.engine,
            inside,
            run,
            reused,
            bill_of_materials.licenses(bill),
            seconds,
        )

    def why_outdated(self, built: Mapping[str, Any], workspace: Path) -> str:
        """Why `built` (an `image.json`) is not the image that `build` would give now, or "".

        workspace: a folder for the build context.
        Raises PipelineError if no engine answers.
        """
        _, _, tag = self._prepare(workspace, silent)
        if tag != built["image"]:
            return f"its source, packages or base image have changed since {built['image']}"
        found = self.engine.find_image(tag)
        return "" if found and found["id"] == built["id"] else f"the engine does not have {tag} as it was built"

    def _prepare(self, workspace: Path, log: Log) -> tuple[ImageContext, str, str]:
        """The build context, the base image and the image's tag."""
        self.engine.require()
        folder = workspace / "context"
        context = prepare_context(folder, self.bentos, self.packaged, self.experiment, self.device, log=log)
        base, base_id = self.engine.base(context.base_image, context.system_packages, log=log)
        return context, base, context.tag(base_id)
