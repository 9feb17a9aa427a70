"""The packaged Bento behind a real `bentoml serve`: text over REST, clear refusals, a clean end."""

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.workplace import BIN, Workplace, free_port, stop, wait_for

pytestmark = pytest.mark.e2e


def bento_tag(workplace: Workplace) -> str:
    return json.loads((workplace.latest("packaged_bento") / "bento.json").read_text())["bento"]


def start_bento(workplace: Workplace, folder: Path, **env: str) -> tuple[subprocess.Popen, str]:
    """`bentoml serve TAG` from a folder that has none of the project's code; its address once it is ready."""
    port, log = free_port(), folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(BIN / "bentoml"), "serve", bento_tag(workplace), "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**workplace.env, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/readyz", process, log)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process, address


@pytest.fixture(scope="module")
def service(smoke, tmp_path_factory):
    process, address = start_bento(smoke, tmp_path_factory.mktemp("service"))
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    if process.poll() is None:
        stop(process)


def test_generate_answers_json_with_usage(service):
    answer = service.post("/generate", json={"prompt": "def ", "max_tokens": 12, "temperature": 0})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert isinstance(body["text"], str) and body["text"]
    assert body["usage"]["generated_tokens"] == 12 or body["finish_reason"] == "stop"


def test_an_answer_leads_to_the_dataset_settings_and_runs_of_its_model(service, smoke):
    info = service.get("/server_info").json()
    answer = service.post("/v1/completions", json={"prompt": "def ", "max_tokens": 1}).json()
    assert answer["system_fingerprint"] == info["system_fingerprint"]
    manifest = smoke.manifest("quantized_model")
    for name in ("experiment", "asset", "content_hash", "upstream", "config"):
        assert info["origin"][name] == manifest[name]
    assert info["origin"]["mlflow_run_id"]
    assert info["system_fingerprint"].split("_")[1] == manifest["content_hash"][:16]


def test_a_stream_gives_the_same_text_in_pieces(service):
    request = {"prompt": "import ", "max_tokens": 20, "temperature": 0.8, "seed": 7}
    whole = service.post("/generate", json=request).json()["text"]
    with service.stream("POST", "/generate", json={**request, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert len(events) > 2
    assert "".join(event.get("text", "") for event in events) == whole


def test_the_routes_of_the_earlier_service_give_the_number_of_tokens_asked_for(service):
    body = {"prompt": "def ", "context": "import os", "num_of_token_generated": 9}
    first = service.post("/generate_text", json=body)
    second = service.post("/generate_text_without_prompt", json={"num_of_token_generated": 9})
    for answer in (first, second):
        assert answer.status_code == 200, answer.text
        assert answer.json()["generated_text"]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x " * 5000, "max_tokens": 4}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "color": "red"}, "color"),
    ],
    ids=["wrong type", "empty", "over-long", "zero tokens", "not a number", "out of range", "unknown"],
)
def test_a_bad_request_is_refused_and_named(service, body, names):
    answer = service.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert names in answer.json()["error"]["message"]
    assert service.post("/generate", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_more_tokens_than_fit_are_clamped_to_the_room(service):
    answer = service.post("/generate", json={"prompt": "x", "max_tokens": 10**9, "temperature": 0})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert answer.json()["finish_reason"] in ("stop", "length")
    assert usage["total_tokens"] <= 256


def test_without_kv_cache_and_in_full_precision_the_switches_do_what_they_say(smoke, tmp_path):
    process, address = start_bento(smoke, tmp_path, REX_KV_CACHE="false", REX_QUANTIZED="false")
    answer = httpx.post(f"{address}/generate", json={"prompt": "def ", "max_tokens": 8, "temperature": 0}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert stop(process) == 0
    log = (tmp_path / "serve.log").read_text()
    assert "kv_cache=False" in log and "quantized=False" in log


def test_a_tag_that_does_not_exist_is_named(smoke, tmp_path):
    done = subprocess.run(
        [str(BIN / "bentoml"), "serve", "rex-smoke:never", "--port", str(free_port())],
        cwd=tmp_path,
        env=smoke.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "'rex-smoke:never' is not found in BentoML store" in done.stdout
    assert "Traceback" not in done.stdout
