"""deploy/docker: the composed stack whose runs are containers; what can be checked without a container engine."""

import re
from typing import Any

import pytest
import yaml

from tests.e2e.workplace import REPO

DEPLOY = REPO / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_only_the_launcher_of_runs_differs_from_the_stack_on_one_host() -> None:
    one, several = read("dagster.yaml"), read("docker/dagster.yaml")
    assert one.pop("run_launcher") != several.pop("run_launcher")
    assert one == several


def test_a_run_gets_the_variables_that_the_services_which_start_it_have() -> None:
    launcher = read("docker/dagster.yaml")["run_launcher"]["config"]
    composed = yaml.safe_load((REPO / "docker-compose.yml").read_text())["x-pipeline"]["environment"]
    extra = read("docker/compose.yml")
    services = extra["services"]
    assert services["webserver"] == services["daemon"] == extra["x-launcher"]
    environment = composed | extra["x-launcher"]["environment"]
    assert set(launcher["env_vars"]) <= set(environment) and services["code"]["environment"].keys() <= set(environment)
    read_here = set(re.findall(r"\{env: (REX_\w+)\}", (DEPLOY / "docker" / "dagster.yaml").read_text()))
    assert read_here <= set(environment)
    (volume,) = launcher["container_kwargs"]["volumes"]
    assert volume == f"{extra['volumes']['rex']['name']}:/var/lib/rex"


def test_the_image_has_runs_started_by_its_python_as_it_has_no_command_dagster() -> None:
    from dagster._cli.api import grpc_command

    (option,) = [option for option in grpc_command.params if option.name == "use_python_environment_entry_point"]
    assert f"{option.envvar}=1" in (REPO / "Dockerfile").read_text()


@pytest.mark.medium
def test_dagster_reads_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dagster_docker", reason="the extra docker is not installed: make cluster")
    from dagster._config import process_config, resolve_to_config_type
    from dagster_docker import DockerRunLauncher

    monkeypatch.setenv("REX_RUN_IMAGE", "rex-pipeline:cpu")
    monkeypatch.setenv("REX_RUN_NETWORK", "rex-runs")
    config = read("docker/dagster.yaml")["run_launcher"]["config"]
    checked = process_config(resolve_to_config_type(DockerRunLauncher.config_type()), config)
    assert checked.success, checked.errors
    launcher = DockerRunLauncher(**checked.value)
    assert (launcher.image, launcher.networks) == ("rex-pipeline:cpu", ["rex-runs"])
