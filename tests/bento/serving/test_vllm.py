"""`bentoml serve` with vLLM as its engine: our routes, keys, limits and metrics, and no process left at the end.

The tests of the OpenAI API run over it with REX_TEST_ENGINE=vllm (`tests/bento/openai_service.py`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from tests.bento.openai_service import VLLM_SHAPE
from tests.bento.running_service import Server, serve
from tests.support.tiny import CONTEXT, tiny_model, tiny_tokenizer
from tests.support.vllm import PYTHON, needs_vllm

pytestmark = pytest.mark.e2e
KEY = "sk-" + "a" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder, tokenizer = tmp_path_factory.mktemp("model"), tiny_tokenizer()
    made = tiny_model(tokenizer, **VLLM_SHAPE)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, made, tokenizer


@pytest.fixture(scope="module")
def server(model: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {
        "REX_ENGINE": "vllm",
        "REX_VLLM_PYTHON": str(PYTHON),
        "LLM_API_KEYS": KEY,
        "REX_MAX_BODY_BYTES": "9999",
    }
    with serve(tmp_path_factory.mktemp("server"), model[0], **variables) as running:
        yield running


@needs_vllm
def test_the_service_answers_behind_its_keys_and_limits_and_ends_with_vllm(
    server: Server, model: tuple[Path, Any, Any]
) -> None:
    _, made, tokenizer = model
    engine = Engine(made, tokenizer, end_of_text_ids=frozenset({tokenizer.eos_token_id}))
    asked = GenerationRequest(engine.encode("def main"), 12, SamplingParameters(temperature=0))
    expected = "".join(event.text for event in engine.submit(asked) if isinstance(event, TextPiece))
    engine.stop()

    body = {"prompt": "def main", "max_tokens": 12, "temperature": 0}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 401
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        name = client.models.list().data[0].id
        whole = client.completions.create(model=name, **body)
        assert whole.choices[0].text == expected and "_vllm_" in str(whole.system_fingerprint)
        streamed = "".join(part.choices[0].text for part in client.completions.create(model=name, stream=True, **body))
        assert streamed == expected
        with pytest.raises(openai.BadRequestError, match="maximum context length is 96 tokens"):
            client.completions.create(model=name, prompt=[5] * (CONTEXT + 1))
        formed = client.completions.create(model=name, **body, extra_body={"guided_regex": "(yes|no)!"})
        assert formed.choices[0].text in ("yes!", "no!")
        with pytest.raises(openai.BadRequestError, match="embedding: the engine vllm does not offer it"):
            client.embeddings.create(model=name, input="a")
    keys = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{server.url}/v1/completions", content=b"x" * 10_000, headers=keys).status_code == 413
    assert 'step="vllm"' in httpx.get(f"{server.url}/metrics", headers=keys, timeout=30).text

    processes = [server.process.pid, *(one.pid for one in psutil.Process(server.process.pid).children(recursive=True))]
    assert any(str(PYTHON) in psutil.Process(pid).cmdline() for pid in processes)
    server.process.terminate()
    server.process.wait(60)
    assert psutil.wait_procs([psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)], 20)[1] == []
