"""Builds the image of the composed stack from this checkout.

    python -m llm_assets.containers.stack [--device cpu] [--tag rex-pipeline:cpu]

The packages are those of `pyproject.toml`, at the versions of `constraints.txt`, unpacked into var/stack/packages. They
stay there, and an unchanged lock is not unpacked again. LLM_ASSETS_BASE_IMAGE overrides the base image of the
Dockerfile.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence

from llm_assets.containers.packages import lock, unpack
from llm_assets.paths import REPOSITORY
from model.errors import PipelineError, ends_in_one_line

PYTHON = "3.11"
EXTRAS = ("postgres", "tracing")
PACKAGES = REPOSITORY / "var" / "stack" / "packages"
"""Below the checkout, regardless of LLM_ASSETS_VAR, as a build sees only the checkout."""


def requirements(device: str) -> list[str]:
    """The image's requirements, from the project's list; torch is the build for the device."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    return [f"{one}+cpu" if device == "cpu" and one.startswith("torch==") else one for one in wanted]


def prepare_packages(device: str) -> None:
    """Fill `PACKAGES`. Raises PipelineError if a package is not found."""
    PACKAGES.parent.mkdir(parents=True, exist_ok=True)
    wanted, locked, done = (PACKAGES.parent / name for name in ("requirements.in", "requirements.txt", "unpacked"))
    wanted.write_text("\n".join(requirements(device)) + "\n")
    lock(wanted, REPOSITORY / "constraints.txt", locked, device=device, python=PYTHON)
    digest = hashlib.sha256(locked.read_bytes()).hexdigest()
    if done.is_file() and done.read_text() == digest and PACKAGES.is_dir():
        return
    done.unlink(missing_ok=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    unpack(locked, PACKAGES, device=device, python=PYTHON)
    done.write_text(digest)


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Build the image and print its tag as the last line."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.containers.stack", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    parser.add_argument("--tag", default="", help="default: rex-pipeline:DEVICE")
    given = parser.parse_args(argv)
    tag = given.tag or f"rex-pipeline:{given.device}"
    if shutil.which("docker") is None:
        raise PipelineError("no command 'docker': an image needs a container engine; install Docker and run again")
    prepare_packages(given.device)
    command = ["docker", "build", "--network", "none", "--tag", tag]
    if base := os.environ.get("LLM_ASSETS_BASE_IMAGE"):
        command += ["--build-arg", f"BASE_IMAGE={base}"]
    if subprocess.run([*command, str(REPOSITORY)], check=False).returncode:
        raise PipelineError(f"building {tag} failed: see the engine's output above")
    print(tag)
    return 0


if __name__ == "__main__":
    sys.exit(main())
