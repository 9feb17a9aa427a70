"""The build context of an image: a Bento for one device, the lock of its packages, and the labels.

FOLDER/bento/          the Bento with its model: `src/bento/Dockerfile` has the instructions,
                       `env/python/requirements.txt` the lock, `sbom.cdx.json` beside it the bill of materials
FOLDER/app/packages/   the packages themselves, once `unpack` has run

A Bento with the engine vllm has a second environment, with a lock of its own, `env/python/vllm.txt`, made from
`src/bento/vllm-DEVICE.txt`: its packages are in FOLDER/app/vllm/, which the image makes a virtual environment. The
service itself then only converts the weights and needs no CUDA.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llm_assets.artifacts.manifest import VERSION_DIGITS
from llm_assets.containers import packages
from llm_assets.paths import REPOSITORY
from llm_assets.resources import bill_of_materials
from llm_assets.resources.bentos import BentoBuilder
from model.progress import Log, silent
from model.system.revision import code_revision, git

# The service's option `device` for each kind of image.
SERVICE_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
TRITON_SYSTEM_PACKAGES = ("gcc", "libc6-dev")
"""Debian packages with which Triton compiles the launchers of its kernels, on a GPU."""
VLLM_SYSTEM_PACKAGES = ("libnuma1",)
"""The library that vLLM links on a CPU."""

VLLM_OMITTED = {"cpu": ("torchaudio", "torchcodec", "torchvision", "triton"), "gpu": ()}
"""Packages that vLLM names and that its file of versions leaves out, which says why."""


@dataclass(frozen=True)
class Environment:
    """Packages of an image. lock: names them with the hashes of their files. device: their build, `cpu` or `gpu`."""

    lock: Path
    folder: Path
    device: str


@dataclass(frozen=True)
class ImageContext:
    """A folder to build an image in, without its packages. device: `cpu` or `gpu`. python: the base's version.

    engine: of the service, `rex` or `vllm`.
    """

    folder: Path
    device: str
    bento: str
    base_image: str
    python: str
    engine: str = "rex"

    @property
    def bill(self) -> Path:
        """The bill of materials, which replaces the Bento's."""
        return self.lock.with_name(bill_of_materials.FILE)

    @property
    def lock(self) -> Path:
        """The file that names every package with its version and the hashes of its files."""
        return self.folder / "bento" / "env" / "python" / "requirements.txt"

    @property
    def environments(self) -> list[Environment]:
        """The service's packages, then those of vLLM, if it is the engine."""
        own = Environment(self.lock, self.folder / "app" / "packages", self.device)
        if self.engine != "vllm":
            return [own]
        site = self.folder / "app" / "vllm" / "lib" / f"python{self.python}" / "site-packages"
        return [replace(own, device="cpu"), Environment(self.lock.with_name("vllm.txt"), site, self.device)]

    @property
    def system_packages(self) -> tuple[str, ...]:
        """Debian packages that the base must have."""
        if self.device == "gpu":
            return TRITON_SYSTEM_PACKAGES
        return VLLM_SYSTEM_PACKAGES if self.engine == "vllm" else ()

    def tag(self, base_id: str) -> str:
        """The image's tag: the model's name, the hash of everything that determines the image, the device."""
        name = self.bento.partition(":")[0]
        content = [self.bento, base_id, *(one.lock.read_text() for one in self.environments)]
        return f"{name}:{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:VERSION_DIGITS]}-{self.device}"

    def unpack(self, log: Log = silent) -> None:
        """Unpack the packages."""
        for one in self.environments:
            packages.unpack(one.lock, one.folder, device=one.device, python=self.python, log=log)


def prepare_context(
    folder: Path, bentos: BentoBuilder, packaged: Mapping[str, Any], experiment: str, device: str, log: Log = silent
) -> ImageContext:
    """Build the Bento of `device` like the packaged one (`bento.json`), copy it to `folder` and lock its packages.

    Raises PipelineError if the lock is not for the device.
    """
    bento = bentos.build_once(
        packaged["bento"].partition(":")[0],
        labels={"experiment": experiment, "device": device},
        arguments={**packaged["arguments"], "device": SERVICE_DEVICE[device]},
        log=log,
    )
    folder.mkdir(parents=True)
    metadata = bentos.export(bento["tag"], folder / "bento", log=log)
    context = ImageContext(
        folder,
        device,
        bento["tag"],
        metadata["base_image"],
        metadata["python_version"],
        packaged["arguments"].get("engine", "rex"),
    )
    own, *further = context.environments
    wanted, tested = own.lock.with_suffix(".in"), REPOSITORY / "constraints.txt"
    packages.lock(wanted, tested, own.lock, device=own.device, python=context.python, log=log)
    for one in further:
        pins = folder / "bento" / "src" / "bento" / f"vllm-{one.device}.txt"
        omitted = VLLM_OMITTED[one.device]
        packages.lock(pins, pins, one.lock, device=one.device, python=context.python, omitted=omitted, log=log)
    return context


def labels(context: ImageContext, *, model: str, experiment: str, base: str) -> dict[str, str]:
    """Labels of the Open Container Initiative, and `rex.` labels for everything else."""
    return {
        "org.opencontainers.image.title": "REX text generation",
        "org.opencontainers.image.source": source(git("remote", "get-url", "origin")),
        "org.opencontainers.image.revision": code_revision(),
        "org.opencontainers.image.version": context.bento.partition(":")[2],
        "org.opencontainers.image.base.name": base,
        "rex.model": model,
        "rex.experiment": experiment,
        "rex.device": context.device,
    }


def source(remote: str) -> str:
    """The code's source: git's remote without user name and password, else the project's name."""
    parts = urlsplit(remote)
    if parts.scheme in ("https", "http", "ssh", "git") and parts.hostname:
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return f"rex-pipeline {version('rex-pipeline')}"
