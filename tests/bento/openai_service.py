"""The whole app over a tiny model, in this process or on a loopback port, with or without a chat template.

With REX_TEST_ENGINE=vllm the model runs in vLLM, in the environment that `tests/support/vllm.py` names: services of one
shape share a process, which takes half a minute to start.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from transformers import PreTrainedTokenizerFast

from bento.api import create_app
from bento.http.protocol import ConnectionLimits, protocol_class
from model.generation.engine import Engine
from model.generation.vllm.engine import VllmEngine
from model.modeling_rex import RexForCausalLM
from model.text.chat.template import TEMPLATE, add_marks
from tests.support.tiny import CONTEXT, tiny_model, tiny_tokenizer
from tests.support.vllm import PYTHON

MODEL = "rex-tiny:1"
IS_VLLM = os.environ.get("REX_TEST_ENGINE") == "vllm"
VLLM_SHAPE = {"hidden_size": 128, "intermediate_size": 128, "seed": 3}
"""Heads of a size that vLLM's attention has on a CPU, and random weights that end a JSON object within the context."""
MAX_BODY_BYTES = 16_384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|pad|>{{ message.role }}\n{{ message.content | trim }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant\n{% endif %}"
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "x"},
    "/score": {"text_1": "x", "text_2": ["x", "y"]},
    "/rerank": {"query": "x", "documents": ["x", "y"]},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/generate": {"prompt": "x", "max_tokens": 2},
    "/generate_text": {"prompt": "x", "num_of_token_generated": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [2]},
}
"""A body for each route that takes one."""


@dataclass
class Service:
    """The app, its engine and what the engine runs."""

    app: FastAPI
    engine: Engine
    model: RexForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a body, NaN and all; no context manager is needed, as no lifespan is."""
        content = json.dumps(body)  # httpx would refuse to send NaN
        return TestClient(self.app).post(path, content=content, headers={"content-type": "application/json"})


@contextmanager
def running_service(
    *,
    chat_template: str | None = None,
    stops: bool = False,
    max_batch_size: int = 8,
    max_queue: int = 64,
    context: int = CONTEXT,
    step: str = "auto",
    **options: Any,
) -> Iterator[Service]:
    """A service; its random weights end a text anywhere, so by default no token does. step: see `Engine`."""
    torch.set_num_threads(1)  # two on busy cores wait for each other
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    if chat_template == TEMPLATE:
        add_marks(tokenizer)
    model = tiny_model(tokenizer, max_position_embeddings=context, **(VLLM_SHAPE if IS_VLLM else {}))
    app = create_app(
        **{"model_name": MODEL, "request_timeout_s": 60, "max_body_bytes": MAX_BODY_BYTES, **options}  # type: ignore[arg-type]
    )
    ends = {} if stops else {"end_of_text_ids": frozenset()}
    limits = {"max_batch_size": max_batch_size, "max_queue": max_queue, **ends}
    engine = _in_vllm(model, tokenizer, limits) if IS_VLLM else Engine(model, tokenizer, step=step, **limits)  # type: ignore[arg-type]
    app.state.models.serve(engine)
    engine.warm_up()
    former, engine.tokenizer = engine.tokenizer, tokenizer
    try:
        yield Service(app, engine, model, tokenizer)
    finally:
        engine.tokenizer = former
        if not IS_VLLM:
            engine.stop()


_in_vllm_by_shape: dict[str, VllmEngine] = {}


def _in_vllm(model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast, limits: dict[str, Any]) -> Engine:
    """An engine that ends with the tests; services that differ by their chat template share it."""
    shape = f"{limits} {model.config.max_position_embeddings} {len(tokenizer)}"
    engine = _in_vllm_by_shape.get(shape)
    if engine is None or not engine.is_alive:
        assert PYTHON.is_file(), f"REX_TEST_ENGINE is vllm, and there is no {PYTHON}: `make vllm` makes it"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            engine = _in_vllm_by_shape[shape] = VllmEngine(Path(folder), python=PYTHON, **limits)
    return engine


@contextmanager
def on_a_port(app: ASGIApp, limits: ConnectionLimits | None = None) -> Iterator[str]:
    """The address of a real HTTP server of `app` on this machine."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="warning",
        http=protocol_class(limits or ConnectionLimits()),  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def events(text: str) -> list[Any]:
    """The data of server-sent events, JSON parsed but for the closing [DONE]; an idle stream has comments as well."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refusal(answer: Any, status: int = 400) -> dict[str, Any]:
    """What a refusal says, its shape checked."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    is_anthropic = answer.request.url.path.startswith("/v1/messages")
    assert set(body) == ({"type", "error"} if is_anthropic else {"error"})
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]
