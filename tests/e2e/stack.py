"""The composed stack on this machine's container engine, under a separate project name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.engine import BASE_IMAGE, require_engine
from tests.e2e.workplace import REPO, free_port

POSTGRES_IMAGE = "postgres:17"
ONE_THREAD = {"services": {"code": {"environment": {"OMP_NUM_THREADS": "1"}}}}
"""A second compose file: the other core is another test's."""


def run(*command: str, timeout: float = 600) -> str:
    """What a command prints, its errors behind it."""
    done = subprocess.run(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"
    return done.stdout


def succeeds(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )


def require_compose() -> list[str]:
    """The words that compose is called with; the test is skipped where there is no engine, or nothing to build on."""
    require_engine()
    for compose in (["docker", "compose"], ["docker-compose"]):
        if succeeds(*compose, "version"):
            return compose
    pytest.skip("neither `docker compose` nor `docker-compose` is installed (Debian's docker-compose)")


def postgres_image() -> str:
    """The real image, or the stand-in if it cannot be pulled."""
    if succeeds("docker", "image", "inspect", POSTGRES_IMAGE) or succeeds("docker", "pull", "--quiet", POSTGRES_IMAGE):
        return POSTGRES_IMAGE
    if not Path("/usr/lib/postgresql").is_dir():
        pytest.skip(f"{POSTGRES_IMAGE} cannot be pulled, nor made without PostgreSQL (Debian's postgresql)")
    return run(str(REPO / ".ci" / "postgres-image"), BASE_IMAGE, "rex-e2e-postgres").splitlines()[-1]


@dataclass
class Stack:
    """A composed stack. settings: what a user writes to .env."""

    compose: list[str]
    project: str
    folder: Path
    settings: dict[str, str]

    def __call__(self, *words: str, profile: str = "", **settings: str) -> str:
        """Run `docker compose`, with other settings where given."""
        env_file, threads = self.folder / "env", self.folder / "threads.json"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in {**self.settings, **settings}.items()))
        threads.write_text(json.dumps(ONE_THREAD))
        files = ["-f", "docker-compose.yml", "-f", str(threads)]
        profiles = ["--profile", profile] if profile else []
        return run(*self.compose, "-p", self.project, *files, "--env-file", str(env_file), *profiles, *words)

    def address(self, service: str) -> str:
        return f"http://127.0.0.1:{self.settings[service]}"

    def container(self, service: str) -> str:
        return self("ps", "-q", service).split()[-1]

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def unhealthy(self) -> list[str]:
        """Services that run without being healthy yet."""
        ids = run("docker", "ps", "-q", "--filter", f"label=com.docker.compose.project={self.project}").split()
        states = json.loads(run("docker", "inspect", *ids)) if ids else []
        return [one["Name"] for one in states if one["State"]["Health"]["Status"] != "healthy"]


@contextmanager
def composed(folder: Path) -> Iterator[Stack]:
    """Images and settings for a stack that is not started yet; what is left of it is removed at the end."""
    compose = require_compose()
    image = run(sys.executable, "-m", "llm_assets.containers.stack", "--tag", "rex-e2e:cpu").splitlines()[-1]
    names = ("PORT", "UI_PORT", "MLFLOW_PORT", "PREVIOUS_PORT")
    settings = {
        "POSTGRES_PASSWORD": "a-password-of-the-test",
        "REX_POSTGRES_IMAGE": postgres_image(),
        "REX_PIPELINE_IMAGE": image,
        "REX_IMAGE": image,
        "REX_PREVIOUS_IMAGE": image,
        "REX_ALLOW_ANONYMOUS": "true",
        "REX_CHAMPION": "rex-smoke",
        "REX_CHAMPION_POLL_S": "1",
        **{name: str(free_port()) for name in names},
    }
    stack = Stack(compose, f"rex-e2e-{os.getpid()}", folder, settings)
    try:
        yield stack
    finally:
        (folder / "stack.log").write_text(stack("logs", "--no-color"))
        stack("down", "--volumes", "--timeout", "5", profile="previous")
