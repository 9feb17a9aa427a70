"""The stack's image and composition, as far as they can be read without a container engine."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llm_assets.containers import stack
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
    assert {str(path.relative_to(REPO)) for path in (PACKAGES, stack.SUPPLY)} <= let_through


def test_the_image_has_a_bill_of_its_packages_and_of_its_base_each_with_a_license(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "thing-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.4\nName: thing\nVersion: 1.0\nLicense-Expression: MIT\n")
    monkeypatch.setattr(stack, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(stack, "SUPPLY", tmp_path)
    debian = {
        "name": "bash",
        "version": "5",
        "architecture": "amd64",
        "licenses": ["as in /usr/share/doc/bash/copyright"],
    }
    stack.write_bill("registry:5000/rex:cpu", {"python": "3.11.9", "debian": [debian]})
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    assert bill["metadata"]["component"]["name"] == "registry:5000/rex"
    assert {one["purl"].partition("?")[0] for one in bill["components"]} == {
        "pkg:pypi/thing@1.0",
        "pkg:generic/cpython@3.11.9",
        "pkg:deb/debian/bash@5",
    }
    assert all(one["licenses"] for one in bill["components"])
    assert f"ARG BASE_IMAGE={stack.BASE}\n" in (REPO / "Dockerfile").read_text()


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
