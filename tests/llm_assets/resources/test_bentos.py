import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest

from llm_assets.resources.bentos import BentoBuilder
from model.errors import PipelineError

SERVICE = """
import os

import bentoml
from pydantic import BaseModel

class Arguments(BaseModel):
    model: str
    kv_cache: bool = True

arguments = bentoml.use_arguments(Arguments)
assert "REX_CHAMPION" not in os.environ, "a build sees what a running service is told"

image = bentoml.images.Image(python_version="3.11", lock_python_packages=False)

@bentoml.service(image=image.python_packages("torch==2.13.0+cpu", "fastapi"))
class Tiny:
    model = bentoml.models.BentoModel(arguments.model)

    @bentoml.api
    def ask(self, prompt: str) -> str:
        return prompt
"""


@pytest.fixture
def builder(tmp_path: Path) -> BentoBuilder:
    (tmp_path / "source" / "bento").mkdir(parents=True)
    (tmp_path / "source" / "bento" / "__init__.py").touch()
    (tmp_path / "source" / "bento" / "service.py").write_text(SERVICE)
    return BentoBuilder(home=str(tmp_path / "home"), service="bento.service:Tiny", source_dir=str(tmp_path / "source"))


@pytest.mark.processes
def test_a_model_is_imported_once_and_a_bento_is_built_from_it(
    builder: BentoBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REX_CHAMPION", "rex-smoke")  # as Dagster reads it from the composed stack's .env
    (tmp_path / "model" / "folder").mkdir(parents=True)
    (tmp_path / "model" / "folder" / "weights").write_text("weights")
    model = builder.import_model("rex-smoke:abc", tmp_path / "model", {"experiment": "smoke"})
    assert (Path(model["path"]) / "folder" / "weights").read_text() == "weights"
    assert model["created"]
    again = builder.import_model("rex-smoke:abc", tmp_path / "model", {})
    assert not again["created"]
    assert again["path"] == model["path"]
    assert builder.find_bento("rex-smoke:def") is None
    lines: list[str] = []
    bento = builder.build(
        "rex-smoke:def",
        labels={"experiment": "smoke"},
        arguments={"model": "rex-smoke:abc", "kv_cache": False},
        log=lines.append,
    )
    assert bento == builder.find_bento("rex-smoke:def")
    assert builder.find_missing("rex-smoke:def", "rex-smoke:abc") == ""
    assert builder.find_missing("rex-smoke:def", "rex-smoke:ghi") == "rex-smoke:ghi"
    assert builder.find_missing("rex-smoke:ghi", "rex-smoke:abc") == "rex-smoke:ghi"
    description = (Path(bento["path"]) / "bento.yaml").read_text()
    assert "rex-smoke:abc" in description
    assert "kv_cache: false" in description.replace("'", "")
    bill = json.loads((Path(bento["path"]) / "env" / "python" / "sbom.cdx.json").read_text())
    held = {one["name"]: one for one in bill["components"]}
    assert held["rex-smoke"]["type"] == "machine-learning-model" and held["rex-smoke"]["version"] == "abc"
    assert held["torch"]["version"] == version("torch")
    assert {"networkx", "starlette"} <= held.keys()  # what torch and FastAPI need
    assert held["fastapi"]["licenses"] == [{"license": {"id": "MIT"}}]


@pytest.mark.processes
def test_a_bento_carries_the_compiled_step_and_another_one_is_another_bento(
    builder: BentoBuilder, tmp_path: Path
) -> None:
    native = Path(builder.source_dir, "model", "native")
    native.mkdir(parents=True)
    (tmp_path / "model").mkdir()
    builder.import_model("rex-smoke:abc", tmp_path / "model", {})
    tags = []
    for content in ("one processor", "one processor", "another"):
        (native / "build.py").write_text(
            f"from pathlib import Path\nPath(__file__).with_name('librex_native.so').write_text({content!r})\n"
        )
        bento = builder.build_once("rex-smoke", labels={}, arguments={"model": "rex-smoke:abc"})
        (carried,) = Path(bento["path"]).rglob("librex_native.so")
        assert carried.read_text() == content
        tags.append(bento["tag"])
    assert tags[0] == tags[1] != tags[2]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("names", [["rex-smoke"] * 3, ["rex-smoke", "rex-other"]], ids=["the same", "different"])
def test_processes_that_package_at_once_each_get_the_bento(
    builder: BentoBuilder, tmp_path: Path, names: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("weights")
    program = """
import json, sys
from pathlib import Path
from llm_assets.resources.bentos import BentoBuilder
fields, name, model = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
builder = BentoBuilder(**fields)
sys.stdin.readline()
imported = builder.import_model(f"{name}:abc", model, {})
built = builder.build_once(name, labels={}, arguments={"model": f"{name}:abc"})
print(json.dumps([imported["created"], built["created"], built["tag"], built["path"]]))
"""
    fields = json.dumps({"home": builder.home, "service": builder.service, "source_dir": builder.source_dir})
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, fields, name, str(tmp_path / "model")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for one in runs:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = [json.loads(one.communicate(timeout=300)[0].splitlines()[-1]) for one in runs]
    for step in (0, 1):  # each name is imported and built exactly once
        assert sum(answer[step] for answer in answers) == len(set(names))
    assert len({answer[2] for answer in answers}) == len(set(names))
    for _, _, _, path in answers:
        assert Path(path, "env", "python", "sbom.cdx.json").is_file()


@pytest.mark.processes
def test_a_failed_build_is_one_line(builder: BentoBuilder) -> None:
    with pytest.raises(PipelineError) as failed:
        builder.build("rex-smoke:def", labels={}, arguments={"model": "no-such-model:abc"})
    assert str(failed.value).startswith("building Bento rex-smoke:def failed (exit status ")
    assert "\n" not in str(failed.value)


def test_the_source_digest_follows_what_is_packed(builder: BentoBuilder) -> None:
    source = Path(builder.source_dir)
    before = builder.source_digest()
    (source / "README.md").write_text("not packed")
    (source / "bento" / "__pycache__").mkdir()
    (source / "bento" / "__pycache__" / "service.pyc").touch()
    assert builder.source_digest() == before
    (source / "constraints.txt").write_text("torch==1")
    pinned = builder.source_digest()
    assert pinned != before
    (source / "bento" / "service.py").write_text(SERVICE + "\n")
    assert builder.source_digest() != pinned


@pytest.mark.processes
def test_an_interrupted_command_leaves_no_process(builder: BentoBuilder, tmp_path: Path) -> None:
    import signal

    pid_file = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    def interrupt() -> None:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        builder._run([sys.executable, "-c", sleeper], "sleeping", print)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
