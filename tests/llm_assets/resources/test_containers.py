"""The engine's resource against commands that answer as an engine does that is not there, or does not work."""

from pathlib import Path

import dagster as dg
import pytest

from llm_assets.containers.context import source
from llm_assets.images import build_defs
from llm_assets.images import defs as image_defs
from llm_assets.resources.containers import ContainerEngine
from model.errors import PipelineError


def command(folder: Path, script: str) -> str:
    """An executable that stands for docker."""
    path = folder / "docker"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def refusal(engine: ContainerEngine) -> str:
    with pytest.raises(PipelineError) as refused:
        engine.require()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_machine_without_docker_is_told_what_to_install() -> None:
    assert "apt install docker.io" in refusal(ContainerEngine(command="no-such-engine"))


@pytest.mark.processes
def test_an_engine_that_does_not_answer_is_told_apart(tmp_path: Path) -> None:
    said = refusal(ContainerEngine(command=command(tmp_path, "echo Cannot connect to the daemon. >&2; exit 1")))
    assert "start it" in said and "Cannot connect to the daemon." in said


@pytest.mark.processes
def test_an_engine_that_answers_is_good_enough(tmp_path: Path) -> None:
    ContainerEngine(command=command(tmp_path, "echo 20.10.24")).require()


@pytest.mark.processes
def test_a_base_that_is_not_there_and_cannot_be_pulled_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_ASSETS_BASE_IMAGE", "mirror/python:3.11-slim")
    engine = ContainerEngine(command=command(tmp_path, "echo no such host >&2; exit 1"))
    with pytest.raises(PipelineError) as refused:
        engine.base("python:3.11-slim")
    assert "image mirror/python:3.11-slim is not on this machine" in str(refused.value)
    assert "no such host" in str(refused.value) and "LLM_ASSETS_BASE_IMAGE" in str(refused.value)


# Answers as an engine whose base has one package, and whose images are those that it built.
ENGINE = """
folder=$(dirname "$0")
case "$1" in
image) [ "$3" = base ] || [ -f "$folder/built" ] || exit 1
  echo '[{"Id": "sha256:1", "Size": 1, "RootFS": {"Layers": []}, "Config": {"Labels": {}}}]' ;;
run) echo '{"python": "3.11.2", "debian": [{"name": "libc6"}]}' ;;
build) cat "$4/Dockerfile" >>"$folder/built" ;;
esac
"""


@pytest.mark.processes
def test_a_base_that_lacks_a_system_package_gets_it_once(tmp_path: Path) -> None:
    engine = ContainerEngine(command=command(tmp_path, ENGINE))
    assert engine.base("base", ("libc6",)) == ("base", "sha256:1")
    found = engine.base("base", ("libc6", "libnuma1"))
    assert found[0].startswith("rex-base:") and engine.base("base", ("libnuma1",)) == found
    instructions = (tmp_path / "built").read_text()
    assert instructions.startswith("FROM base\nRUN apt-get update") and instructions.count("FROM") == 1
    assert "--no-install-recommends libnuma1 &&" in instructions


@pytest.mark.processes
def test_a_system_package_that_cannot_be_added_is_named(tmp_path: Path) -> None:
    failing = ENGINE.replace('cat "$4/Dockerfile" >>"$folder/built"', "echo no network >&2; exit 1")
    engine = ContainerEngine(command=command(tmp_path, failing))
    with pytest.raises(
        PipelineError, match=r"^adding libnuma1 to base failed .*no network; name a base image that has"
    ):
        engine.base("base", ("libnuma1",))


@pytest.mark.processes
def test_a_failed_build_is_one_line(tmp_path: Path) -> None:
    engine = ContainerEngine(command=command(tmp_path, "echo Step 1; echo BuildKit is broken >&2; exit 1"))
    lines: list[str] = []
    with pytest.raises(PipelineError, match=r"^building image rex:1-cpu failed .*: BuildKit is broken$"):
        engine.build("rex:1-cpu", tmp_path, "python:3.11-slim", {"a": "b"}, log=lines.append)
    assert any(line.endswith("Step 1") for line in lines)


def test_only_a_gpu_image_is_run_with_gpus() -> None:
    engine = ContainerEngine()
    for device, has_gpus in (("cpu", False), ("gpu", True)):
        line = engine.run_command(f"rex:1-{device}", device)
        assert ("--gpus all" in line) == has_gpus
        assert "--read-only" in line and "--cap-drop ALL" in line and line.endswith(f"rex:1-{device}")


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("https://name:secret@example.org/rex.git", "https://example.org/rex.git"),
        ("ssh://git@example.org/rex.git", "ssh://example.org/rex.git"),
        ("/home/somebody/rex", "rex-pipeline 0.1.0"),
        ("", "rex-pipeline 0.1.0"),
    ],
)
def test_the_source_label_tells_no_secret_and_no_path(remote: str, said: str) -> None:
    assert source(remote) == said


def test_the_code_location_has_an_image_and_a_job_for_each_device() -> None:
    repository = image_defs().get_repository_def()
    repository.load_all_definitions()
    for device in ("cpu", "gpu"):
        job = repository.get_job(f"container_image_{device}_job")
        key = dg.AssetKey(f"container_image_{device}")
        assert job.asset_layer.executable_asset_keys == {key}
        assert {parent.path[-1] for parent in job.asset_layer.get(key).parent_keys} == {
            "packaged_bento",
            "trained_checkpoint",
        }
    mine = ContainerEngine(command="podman")
    assert build_defs({"containers": mine}).resources["containers"] is mine
