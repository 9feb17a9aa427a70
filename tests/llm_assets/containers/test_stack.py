"""The stack's image and composition, as far as they can be read without a container engine."""

import re
from pathlib import Path

import pytest
import yaml

from llm_assets.containers.prepare import EXAMPLE_PASSWORD
from llm_assets.containers.stack import PACKAGES, requirements

REPO = Path(__file__).resolve().parents[3]
COMPOSE = yaml.safe_load((REPO / "docker-compose.yml").read_text())


def test_the_image_has_the_projects_packages_and_torch_for_its_device() -> None:
    cpu, gpu = requirements("cpu"), requirements("gpu")
    (torch,) = [one for one in gpu if one.startswith("torch")]
    assert f"{torch}+cpu" in cpu and torch not in cpu
    names = {re.split("[<>=]", one)[0] for one in cpu}
    assert {"dagster", "dagster-postgres", "mlflow", "bentoml"} <= names


def test_all_that_the_dockerfile_copies_is_in_its_context() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (REPO / "Dockerfile").read_text(), re.MULTILINE)
    let_through = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for line in copied for name in line.split()} == let_through
    assert str(PACKAGES.relative_to(REPO)) in let_through


@pytest.mark.parametrize("service", sorted(COMPOSE["services"]))
def test_every_service_is_limited_watched_and_started_again(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert (
        settings["mem_limit"] and settings["cap_drop"] == ["ALL"] and settings["security_opt"] == ["no-new-privileges"]
    )
    if service == "prepare":
        assert settings["restart"] == "no"
    else:
        assert settings["restart"] == "unless-stopped" and settings["healthcheck"]
    for port in settings.get("ports", []):
        assert re.match(r"\$\{REX_(UI_)?BIND:-127\.0\.0\.1\}:", port), port


def test_the_example_has_no_real_password_and_names_what_the_composition_reads() -> None:
    lines = [line for line in (REPO / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    example = dict(line.split("=", 1) for line in lines)
    assert example["POSTGRES_PASSWORD"] == EXAMPLE_PASSWORD and not example["LLM_API_KEYS"]
    assert set(example) <= set(re.findall(r"\$\{(\w+)", (REPO / "docker-compose.yml").read_text()))
