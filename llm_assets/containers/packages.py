"""An image's Python packages: locked and unpacked on this machine with uv, for the Python of the image.

The image build then needs no network and no index. uv reads its own variables (UV_DEFAULT_INDEX, UV_INDEX,
UV_FIND_LINKS, SSL_CERT_FILE); unset ones are filled from pip's configuration, which uv does not read. PyPI's torch is
the CUDA build; the CPU build comes from a folder that pip's `find-links` names, else from PyTorch's own index.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.errors import PipelineError
from model.progress import Log, silent
from model.system.commands import run

# Packages that only a CUDA build of torch needs; BentoML needs nvidia-ml-py everywhere.
CUDA_PACKAGES = ("nvidia-cu", "cuda-", "triton")
_PIP_OPTIONS = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}


def uv_environment(device: str, pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: `environment`, completed from pip's options, given by name.

    device: `cpu` or `gpu`. Folders of wheels are used only for `cpu`, and only if they hold a CPU build of torch: it
    would get into a GPU image as well, because `X+cpu` satisfies `torch==X`.
    """
    found = {variable: pip[option] for option, variable in _PIP_OPTIONS.items() if pip.get(option)}
    if "UV_INDEX_URL" in environment:
        found.pop("UV_DEFAULT_INDEX", None)
    if device == "cpu" and not {"UV_FIND_LINKS", "UV_TORCH_BACKEND"} & environment.keys():
        folders = [folder for folder in pip.get("find-links", "").split() if any(Path(folder).glob("torch-*+cpu*.whl"))]
        found |= {"UV_FIND_LINKS": ",".join(folders)} if folders else {"UV_TORCH_BACKEND": "cpu"}
    return {**found, **environment}


def pip_options() -> dict[str, str]:
    """Options of pip by name, merged from its configuration files and variables; later ones win."""
    printed = run([sys.executable, "-m", "pip", "config", "list"], "reading pip's configuration")
    options: dict[str, str] = {}
    for line in printed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:"):
            options[name] = value.strip("'\"")
    return options


def lock(
    requirements: Path,
    constraints: Path,
    target: Path,
    *,
    device: str,
    python: str,
    omitted: Sequence[str] = (),
    log: Log = silent,
) -> None:
    """Write every package that `requirements` needs, with its version and the hashes of its files, to `target`.

    constraints: the versions that the project is tested with. python: version of the image's Python, as "3.11".
    omitted: packages that are left out although others name them. Raises PipelineError if packages are not found, or if
    packages of the other device are among them.
    """
    command = [*_uv("compile", python), "--no-header", "--no-annotate", "--generate-hashes", "--quiet"]
    command += ["--constraint", str(constraints), "--output-file", str(target)]
    if omitted:
        overrides = target.with_suffix(".overrides")
        overrides.write_text("".join(f"{name}; python_version < '0'\n" for name in omitted))
        command += ["--override", str(overrides)]
    command.append(str(requirements))
    run(command, "locking the image's packages", environment=_environment(device), log=log, name="uv")
    refuse_other_device(target.read_text(), device)


def pinned(locked: str) -> list[str]:
    """`NAME==VERSION` of each package of a lock, without the hashes of its files."""
    return re.findall(r"^[\w.-]+==[^\s\\;]+", locked, re.MULTILINE)


def refuse_other_device(locked: str, device: str) -> None:
    """Raise PipelineError if a lock for `cpu` has CUDA packages, or one for `gpu` has none or a CPU build of torch."""
    names = pinned(locked)
    cuda = [name.partition("==")[0] for name in names if name.startswith(CUDA_PACKAGES)]
    torch = next((name for name in names if name.startswith("torch==")), "no torch")
    if device == "cpu" and cuda:
        raise PipelineError(
            f"the lock of a CPU image has {len(cuda)} packages for CUDA ({cuda[0]} first) and {torch}: expected none; "
            "is UV_TORCH_BACKEND=cpu or a folder with the CPU build of torch in UV_FIND_LINKS?"
        )
    if device == "gpu" and (not cuda or "+cpu" in torch):
        raise PipelineError(
            f"the lock of a GPU image has {torch} and {len(cuda)} packages for CUDA: expected PyPI's CUDA build; do "
            "UV_FIND_LINKS, UV_INDEX or UV_TORCH_BACKEND name CPU builds?"
        )


def unpack(locked: Path, folder: Path, *, device: str, python: str, log: Log = silent) -> None:
    """Unpack the packages of a lock into `folder`, which the image has on its PYTHONPATH.

    Raises PipelineError if a file's hash differs from the lock.
    """
    command = [
        *_uv("install", python),
        "--quiet",
        "--require-hashes",
        "--no-deps",
        "--target",
        str(folder),
        "--requirement",
        str(locked),
    ]
    run(command, "unpacking the image's packages", environment=_environment(device), log=log, name="uv")
    remove_unused(folder)


def remove_unused(folder: Path) -> None:
    """Delete a seventh of the packages, which an image would copy and compile for nothing.

    Scripts in bin/ start this host's Python; torch/include is 10,000 headers, and the image has no compiler; torch/bin
    has test programs of 50 MB besides the one that torch starts; packages bring their own tests.
    """
    for unused in ("bin", "torch/include", "torch/test"):
        shutil.rmtree(folder / unused, ignore_errors=True)
    for program in (folder / "torch" / "bin").glob("*"):
        if program.is_file() and program.name != "torch_shm_manager":
            program.unlink()
    for parent, folders, _ in os.walk(folder):
        if "tests" in folders and not parent.endswith(".dist-info"):
            shutil.rmtree(Path(parent, "tests"))
            folders.remove("tests")


def _uv(command: str, python: str) -> list[str]:
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    # The glibc of Debian 11 and later. Source distributions would be built for and by this machine.
    for_image = ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_31", "--only-binary", ":all:"]
    return [sys.executable, "-m", "uv", "pip", command, "--python", sys.executable, *for_image]


def _environment(device: str) -> dict[str, str]:
    return uv_environment(device, pip_options(), os.environ)
