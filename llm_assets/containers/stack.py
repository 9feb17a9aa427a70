"""Builds the image of the composed stack from this checkout.

    python -m llm_assets.containers.stack [--device cpu] [--tag rex-pipeline:cpu]

The packages are those of `pyproject.toml`, at the versions of `constraints.txt` and with the hashes of a lock, unpacked
into var/stack/packages. They stay there, and an unchanged lock is not unpacked again. LLM_ASSETS_BASE_IMAGE overrides
the base image of the Dockerfile. The lock and the bill of materials are in the image, in /app/supply.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from llm_assets.containers.packages import lock, unpack
from llm_assets.paths import REPOSITORY
from llm_assets.resources import bill_of_materials
from llm_assets.resources.containers import ContainerEngine
from model.errors import PipelineError, ends_in_one_line

PYTHON, BASE = "3.11", "python:3.11-slim"
EXTRAS = ("postgres", "tracing")
PACKAGES = REPOSITORY / "var" / "stack" / "packages"
"""Below the checkout, regardless of LLM_ASSETS_VAR, as a build sees only the checkout."""
SUPPLY = PACKAGES.with_name("supply")
"""The lock of the packages and the bill of materials."""


def requirements(device: str, extras: Sequence[str] = ()) -> list[str]:
    """The image's requirements, from the project's list; torch is the build for the device.

    extras: of the project, beside those that every image has. Raises PipelineError for one that it does not have.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        raise PipelineError(f"--extra is {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    wanted = [*project["dependencies"], *(one for extra in dict.fromkeys([*EXTRAS, *extras]) for one in known[extra])]
    return [f"{one}+cpu" if device == "cpu" and one.startswith("torch==") else one for one in wanted]


def prepare_packages(device: str, extras: Sequence[str] = ()) -> None:
    """Fill `PACKAGES`. extras: as in `requirements`. Raises PipelineError if a package is not found."""
    SUPPLY.mkdir(parents=True, exist_ok=True)
    wanted, done = (PACKAGES.with_name(name) for name in ("requirements.in", "unpacked"))
    locked = SUPPLY / "requirements.txt"
    wanted.write_text("\n".join(requirements(device, extras)) + "\n")
    lock(wanted, REPOSITORY / "constraints.txt", locked, device=device, python=PYTHON)
    digest = hashlib.sha256(locked.read_bytes()).hexdigest()
    if done.is_file() and done.read_text() == digest and PACKAGES.is_dir():
        return
    done.unlink(missing_ok=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    unpack(locked, PACKAGES, device=device, python=PYTHON)
    done.write_text(digest)


def write_bill(tag: str, base: Mapping[str, Any]) -> None:
    """Write the bill of materials of the image `tag`: `PACKAGES`, and what the base image holds.

    base: the result of `ContainerEngine.base_packages`.
    """
    name, _, version = tag.rpartition(":")
    held = [*bill_of_materials.of_folder(PACKAGES), *bill_of_materials.of_base_image(base)]
    bill_of_materials.write(SUPPLY / bill_of_materials.FILE, name=name, version=version, components=held)


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Build the image and print its tag as the last line."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.containers.stack", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--extra", action="append", default=[], help="of pyproject.toml, such as s3, ray or kubernetes; repeatable"
    )
    parser.add_argument("--tag", default="", help="default: rex-pipeline:DEVICE")
    given = parser.parse_args(argv)
    tag = given.tag or f"rex-pipeline:{given.device}"
    if ":" not in tag:
        tag += f":{given.device}"
    if shutil.which("docker") is None:
        raise PipelineError("no command 'docker': an image needs a container engine; install Docker and run again")
    engine = ContainerEngine()
    base, _ = engine.base(BASE)
    prepare_packages(given.device, given.extra)
    write_bill(tag, engine.base_packages(base))
    command = ["docker", "build", "--network", "none", "--tag", tag, "--build-arg", f"BASE_IMAGE={base}"]
    if subprocess.run([*command, str(REPOSITORY)], check=False).returncode:
        raise PipelineError(f"building {tag} failed: see the engine's output above")
    print(tag)
    return 0


if __name__ == "__main__":
    sys.exit(main())
