"""Installs this project, editable, with extras, from the locked packages: a file with another hash is refused.

    python -m llm_assets.instance.install EXTRA ...             # as `make setup`
    python -m llm_assets.instance.install --lock [PACKAGE ...]  # as `make lock`: write constraints.txt, PACKAGEs newer

Runs in a new environment that has only pip, torch and uv, so it imports nothing else. uv finds the package index in its
own variables, else in pip's configuration. torch is not in the lock: pip installs it first, in the device's build.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence

from llm_assets.containers.packages import pinned, pip_options, uv_environment
from llm_assets.paths import REPOSITORY
from model.errors import PipelineError, ends_in_one_line
from model.progress import with_dots

CONSTRAINTS = REPOSITORY / "constraints.txt"
OLDEST_PYTHON = "3.11"


def install_command(extras: Sequence[str]) -> list[str]:
    """Arguments of `uv pip`. Raises PipelineError for an extra that pyproject.toml does not have."""
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        raise PipelineError(f"no extra {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    project = f"{REPOSITORY}[{','.join(extras)}]"
    return ["install", "--python", sys.executable, "--constraint", str(CONSTRAINTS), "--editable", project]


def lock_command(upgraded: Sequence[str]) -> list[str]:
    """Arguments of `uv pip` that lock all extras for every Python and system; only `upgraded` get newer releases.

    Raises PipelineError for a package that is not in the lock, which uv would pass over.
    """
    held = {line.partition("==")[0] for line in pinned(CONSTRAINTS.read_text())}
    if unknown := [name for name in upgraded if name not in held]:
        raise PipelineError(f"no package {unknown[0]!r} in {CONSTRAINTS.name}: name one as it is spelled there")
    wanted = ["compile", "pyproject.toml", "--all-extras", "--universal", "--python-version", OLDEST_PYTHON]
    form = ["--generate-hashes", "--no-annotate", "--output-file", CONSTRAINTS.name]
    omitted = ["--no-emit-package=torch", "--no-emit-package=pip"]
    return [*wanted, *form, *omitted, *(f"--upgrade-package={name}" for name in upgraded)]


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; the exit status is uv's."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_assets.instance.install",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="extras of pyproject.toml; with --lock, packages")
    parser.add_argument("--lock", action="store_true", help="write constraints.txt")
    given = parser.parse_args(argv)
    if not given.lock and not given.names:
        raise PipelineError("nothing to install: name an extra of pyproject.toml, such as dev")
    command = lock_command(given.names) if given.lock else install_command(given.names)
    label = "locking" if given.lock else f"installing {', '.join(given.names)}"
    return with_dots(lambda: _run_uv(command), label)


def _run_uv(command: Sequence[str]) -> int:
    # As for a GPU, which adds no folder of wheels and no backend of torch: torch is there.
    environment = uv_environment("gpu", pip_options(), os.environ) | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}
    uv = [sys.executable, "-m", "uv", "pip", command[0], "--quiet", *command[1:]]
    return subprocess.run(uv, cwd=REPOSITORY, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
