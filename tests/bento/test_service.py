"""The Bento as a user meets it: built by the command line, served from an empty folder, ended by SIGTERM."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llm_assets.containers.packages import pinned
from tests.e2e.workplace import BIN, REPO, free_port, stop, wait_for
from tests.support.tiny import save_tiny_model

TAG = "rex-tiny:1"
pytestmark = pytest.mark.e2e

IMPORT_MODEL = """
import shutil, sys, bentoml
with bentoml.models.create(sys.argv[1]) as model:
    shutil.copytree(sys.argv[2], model.path, dirs_exist_ok=True)
"""
LOAD_EVERYTHING = """
import sys
from _bentoml_impl.loader import load
load(sys.argv[1], standalone_load=True)
service = sys.modules["bento.service"]
engine = service.start_engine(service.options, service.MODEL_DIR)
engine.stop()
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in ("bento", "model")), sep="\\n")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A BentoML home with a tiny model and the Bento built from it."""
    folder = tmp_path_factory.mktemp("home")
    model_dir = save_tiny_model(tmp_path_factory.mktemp("model"))
    run([sys.executable, "-c", IMPORT_MODEL, TAG, str(model_dir)], folder)
    name, version = TAG.split(":")
    command = [BIN / "bentoml", "build", "bento.service:RexService", "--name", name, "--version", version]
    command += ["--label", "experiment=tiny", "--arg", f"model={TAG}", "--arg", "device=cpu", "-o", "tag"]
    built = run(command, folder, cwd=REPO)
    assert built.stdout.splitlines()[-1] == f"__tag__:{TAG}"
    return folder


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BENTOML", "REX_"))}
    return {**kept, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1", **variables}


def run(command: list, home: Path, *, cwd: Path | None = None, check: bool = True, **variables: str):
    """A command in a separate environment, by default from a folder without the project's code."""
    return subprocess.run(
        command,
        cwd=cwd or home,
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=check,
    )


def bento_path(home: Path) -> Path:
    return home / "bentos" / TAG.replace(":", "/")


@pytest.fixture(scope="module")
def server(home, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, httpx.Client, Path]]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [BIN / "bentoml", "serve", TAG, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment(home, REX_KV_CACHE="false"),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", process, log)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client, log
    finally:
        if process.poll() is None:
            stop(process)


def test_the_bento_holds_only_what_serving_needs(home):
    packed = {path.relative_to(bento_path(home) / "src").parts[0] for path in (bento_path(home) / "src").rglob("*")}
    assert packed == {"bento", "model", "bentofile.yaml"}
    for path in (REPO / "bento/page").iterdir():
        assert path.is_dir() or (bento_path(home) / "src/bento/page" / path.name).is_file(), path
    requirements = (bento_path(home) / "env/python/requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+(\+cpu)?", line) for line in requirements), requirements
    assert requirements[0].startswith("torch==") and requirements[0].endswith("+cpu")
    assert set(requirements[1:]) <= set(pinned((REPO / "constraints.txt").read_text()))
    dockerfile = (bento_path(home) / "env/docker/Dockerfile").read_text()
    assert "FROM python:3.11-slim" in dockerfile
    assert "build-essential" not in dockerfile


def test_every_module_that_serves_comes_from_the_bento(home):
    files = run([sys.executable, "-c", LOAD_EVERYTHING, TAG], home).stdout.splitlines()
    ours = [file for file in files if file.endswith(".py")]
    assert len(ours) > 15
    assert all(file.startswith(f"{bento_path(home)}/src/") for file in ours), ours


def test_the_served_bento_generates_and_streams(server):
    _, client, _ = server
    request = {"prompt": "confidential", "max_tokens": 12, "temperature": 0.5, "seed": 1}
    answer = client.post("/generate", json=request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == TAG
    streamed = client.post("/generate", json={**request, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert "".join(json.loads(line)["text"] for line in lines[:-1]) == answer.json()["text"]
    assert client.post("/generate", json={"prompt": ""}).status_code == 400
    assert client.post("/generate_text_without_prompt", json={"num_of_token_generated": 3}).status_code == 200


def test_health_metrics_and_documents_are_served(server):
    _, client, _ = server
    for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/"):
        assert client.get(path).status_code == 200, path
    assert "rex_requests_total" in client.get("/metrics").text
    for number in range(3):
        assert client.get(f"/nothing/{number}").status_code == 404
    assert "nothing" not in client.get("/metrics").text


def test_sigterm_ends_the_service_with_status_0_and_a_log_without_prompts(server):
    process, client, log = server
    client.post("/generate", json={"prompt": "confidential", "max_tokens": 2})
    assert stop(process) == 0
    text = log.read_text()
    assert "kv_cache=False" in text
    assert "route=/generate status=200" in text
    assert "confidential" not in text
    assert "Traceback" not in text


def test_a_model_that_is_not_there_ends_the_start_in_one_line(home, tmp_path):
    shutil.copytree(home / "bentos", tmp_path / "bentos")
    (tmp_path / "models").mkdir()
    command = [BIN / "bentoml", "serve", TAG, "--host", "127.0.0.1", "--port", str(free_port())]
    moved = run(command, tmp_path, check=False)
    overridden = run(command, home, check=False, REX_MODEL="never-made:1")
    for done, model in ((moved, TAG), (overridden, "never-made:1")):
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and model in done.stderr and "not in the BentoML model store" in done.stderr


def test_a_device_that_is_not_there_ends_the_start_in_one_line(home):
    command = [BIN / "bentoml", "serve", TAG, "--host", "127.0.0.1", "--port", str(free_port())]
    done = run(command, home, check=False, REX_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "'cuda'" in done.stderr
