"""A container engine for the tests that need one, and a container of the service that they look at."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest

from bench.containers.container import HARDENED
from tests.e2e.workplace import free_port

BASE_IMAGE = "python:3.11-slim"


def docker(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def require_engine() -> None:
    """Skip, by the reason, where no engine answers or there is nothing to build on."""
    if shutil.which("docker") is None:
        pytest.skip("no container engine: there is no command docker (Debian's docker.io)")
    answer = docker("version", "--format", "{{.Server.Version}}")
    if answer.returncode:
        pytest.skip(f"no container engine: {(answer.stdout.strip() or 'docker says nothing').splitlines()[-1]}")
    if docker("image", "inspect", BASE_IMAGE).returncode and docker("pull", "--quiet", BASE_IMAGE).returncode:
        pytest.skip(f"no image {BASE_IMAGE}, and none can be pulled: .ci/base-image makes one")


@dataclass
class Container:
    """A container of the service; its port 3000 is `url` on this machine."""

    id: str
    url: str

    def inspect(self) -> dict:
        return json.loads(docker("inspect", self.id).stdout)[0]

    def log(self) -> str:
        return docker("logs", self.id).stdout

    def python(self, program: str) -> str:
        """What a program prints that the image's Python runs inside, as the service's user."""
        done = docker("exec", self.id, "python3", "-c", program)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def wait_until_ready(self, seconds: float = 300) -> None:
        """Fail with the container's log if it ends permanently or never answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            if self.inspect()["State"]["Status"] == "exited":
                break
        pytest.fail(f"not ready:\n{self.log()[-3000:]}")


def start(image: str, *options: str) -> Container:
    """Run the service of an image as the README says: hardened, for this machine alone."""
    port = free_port()
    done = docker(
        "run", "--detach", "--publish", f"127.0.0.1:{port}:3000", *HARDENED, "--memory", "1g", *options, image
    )
    assert done.returncode == 0, done.stdout
    return Container(done.stdout.strip(), f"http://127.0.0.1:{port}")
