"""docker-compose.yml is read by both versions of compose; reading needs no container engine."""

import re
import subprocess

import pytest
import yaml

from llm_assets.jobs.automation import WEBHOOK
from tests.e2e.workplace import REPO


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not there")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("compose", "versions"), [(["docker", "compose"], "[2-9]"), (["docker-compose"], "1")], ids=["plugin", "first"]
)
def test_compose_reads_the_file_with_the_settings_of_the_example(compose: list[str], versions: str) -> None:
    found = _run(*compose, "version", "--short").stdout.strip().removeprefix("v")
    if not re.match(versions, found):
        what = f"is version {found}" if found else "is not installed"
        pytest.skip(f"`{' '.join(compose)}` {what}: .ci/run installs the plugin and the first version")
    read = _run(*compose, "--env-file", ".env.example", "config", "--services")
    assert read.returncode == 0, read.stderr
    assert set(read.stdout.split()) >= {"postgres", "prepare", "mlflow", "code", "webserver", "daemon", "generate"}


def test_the_code_location_gets_the_address_that_failed_runs_are_posted_to() -> None:
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]
    assert services["code"]["environment"][WEBHOOK] == f"${{{WEBHOOK}:-}}"
    assert f"\n{WEBHOOK}=\n" in (REPO / ".env.example").read_text()
