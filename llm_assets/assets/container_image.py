"""The service as a container image: one asset for CPUs, one for GPUs, of the same Bento but for the device.

A code location of their own (`llm_assets.images`): the pipeline and everything downstream of a stage of it is
materialized without a container engine.
"""

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import dagster as dg

from llm_assets import checks, packages
from llm_assets.assets import COMMON
from llm_assets.manifest import VERSION_DIGITS
from llm_assets.paths import REPOSITORY
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import stage

# As the service's option `device` calls them.
SERVICE_DEVICE = {"cpu": "cpu", "gpu": "cuda"}


def build_container_image(device: str) -> dg.AssetsDefinition:
    """The asset `container_image_cpu` or `container_image_gpu`."""
    name = f"container_image_{device}"

    @dg.asset(
        name=name,
        **COMMON,
        group_name="images",
        kinds={"docker"},
        code_version="1",
        check_specs=checks.specs(name),
        description=f"An image of the generation service for {device.upper()}s, tagged by its content. The artifact is "
        "`image.json` (tag, size, labels, the command that runs it) and the lock of its packages.",
    )
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
            engine = containers.require()
            packaged = json.loads((packaged_bento / "bento.json").read_text())
            bento = bentos.build_once(
                packaged["bento"].partition(":")[0],
                labels={"experiment": work.experiment, "device": device},
                arguments={**packaged["arguments"], "device": SERVICE_DEVICE[device]},
                log=work.log,
            )
            build = work.scratch / "context"
            build.mkdir()
            says = bentos.export(bento["tag"], build / "bento", log=work.log)
            python, lock = says["python_version"], work.output / "requirements.txt"
            requirements = build / "bento" / "env" / "python" / "requirements.txt"
            packages.lock(
                requirements, REPOSITORY / "constraints.txt", lock, device=device, python=python, log=work.log
            )
            base, base_id = containers.base(says["base_image"], log=work.log)
            content = hashlib.sha256("\n".join([bento["tag"], base_id, lock.read_text()]).encode()).hexdigest()
            tag = f"{bento['tag'].partition(':')[0]}:{content[:VERSION_DIGITS]}-{device}"
            labels = image_labels(
                version=bento["tag"].partition(":")[2],
                model=packaged["model"],
                experiment=work.experiment,
                device=device,
                base=base,
            )
            image = containers.find_image(tag)
            reused = image is not None
            if image is None:
                packages.unpack(lock, build / "packages", device=device, python=python, log=work.log)
                image = containers.build(tag, build, base, labels, log=work.log)
            inside = containers.look_into(tag)
            record = {
                "image": tag,
                "image_id": image["id"],
                "image_bytes": image["bytes"],
                "layers": image["layers"],
                "labels": image["labels"],
                "bento": bento["tag"],
                "run": containers.run_command(tag, device),
                **inside,
            }
            (work.output / "image.json").write_text(json.dumps(record, indent=2) + "\n")
            seconds = round(time.monotonic() - started, 1)
            work.log(f"{tag}: {image['bytes'] / 1e9:.2f} GB, {'found' if reused else 'built'} in {seconds} s")
            work.log(f"run it: {record['run']}")
            yield work.result(
                {
                    "image": tag,
                    "image_bytes": image["bytes"],
                    "layers": image["layers"],
                    "build_seconds": seconds,
                    "labels": dg.MetadataValue.json(image["labels"]),
                    "run": dg.MetadataValue.md(f"`{record['run']}`"),
                    "torch": inside["torch"],
                    "bento": bento["tag"],
                    "engine": engine,
                    "reused": reused,
                },
                checks.of_image(name, device, inside, image["bytes"]),
            )

    return container_image


def image_labels(*, version: str, model: str, experiment: str, device: str, base: str) -> dict[str, str]:
    """The labels of the Open Container Initiative, and `rex.` for what those have no name for."""
    return {
        "org.opencontainers.image.title": "REX text generation",
        "org.opencontainers.image.source": source(),
        "org.opencontainers.image.revision": revision(),
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.base.name": base,
        "rex.model": model,
        "rex.experiment": experiment,
        "rex.device": device,
    }


def source() -> str:
    """Where the code comes from: the address of git's `origin` without a name or password, else the project's name."""
    remote = urlsplit(_git("remote", "get-url", "origin"))
    if remote.scheme in ("https", "http", "ssh", "git") and remote.hostname:
        return urlunsplit(remote._replace(netloc=remote.netloc.rpartition("@")[2]))
    return f"rex-pipeline {version('rex-pipeline')}"


def revision() -> str:
    """The commit, with `-dirty` behind it where files differ from it; `unknown` outside a git repository."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
