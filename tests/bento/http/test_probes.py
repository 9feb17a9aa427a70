"""Names that gateways, load tools, harnesses and other clients ask for."""

import json

import bentoml
import httpx
import pytest
from starlette.testclient import TestClient

from bento.serving import answers
from tests.bento.conftest import make_service
from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, MODEL, events, on_a_port, refusal, running_service


@pytest.fixture(scope="module")
def service():
    with running_service(chat_template=CHAT_TEMPLATE, aliases=["gpt-4o", "small"]) as running:
        yield running


@pytest.fixture
def client(service) -> TestClient:
    return TestClient(service.app)


def test_probes_answer_by_get_and_head_and_ping_by_post(client):
    for path in ("/health", "/ping", "/version"):
        assert client.get(path).status_code == client.head(path).status_code == 200
    assert client.post("/ping").status_code == 200
    assert client.get("/version").json()["version"]


def test_health_fails_while_requests_are_refused(service, client):
    service.app.state.admission.is_draining = True
    try:
        assert refusal(client.get("/health"), 503)["code"] == "draining"
    finally:
        service.app.state.admission.is_draining = False


def test_the_server_reports_the_served_model(service, client):
    info = client.get("/server_info").json()
    assert info["model"] == MODEL and info["max_model_len"] == service.engine.context_length
    body = client.post("/v1/completions", json=GOOD["/v1/completions"]).json()
    assert body["system_fingerprint"] == info["system_fingerprint"]
    assert info["engine"] in info["system_fingerprint"] and info["precision"] in info["system_fingerprint"]
    chunks = events(client.post("/v1/completions", json={**GOOD["/v1/completions"], "stream": True}).text)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {info["system_fingerprint"]}


def test_the_tokenizer_is_described_as_harnesses_read_it(service, client):
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == service.tokenizer.eos_token
    assert info["chat_template"] == CHAT_TEMPLATE
    for name in ("bos_token", "eos_token", "pad_token"):
        known = client.post("/tokenize", json={"prompt": info[name], "add_special_tokens": False}).json()
        assert known["tokens"] == [getattr(service.tokenizer, f"{name}_id")]
        assert client.post("/tokenize", json={"prompt": f"{info[name]} "}).json()["count"] > 2


@pytest.mark.parametrize("name", [MODEL, MODEL.partition(":")[0], "gpt-4o", "small"])
def test_the_model_answers_to_its_stable_name_and_its_aliases(client, name):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = client.post(path, json={**GOOD[path], "model": name})
        assert answer.status_code == 200
        assert answer.json().get("model", MODEL) == MODEL
    assert client.get(f"/v1/models/{name}").json()["id"] == MODEL


def test_the_list_of_models_has_the_aliases_and_what_they_stand_for(client):
    models = client.get("/v1/models").json()["data"]
    assert [(model["id"], model.get("root")) for model in models] == [
        (MODEL, None),
        ("gpt-4o", MODEL),
        ("small", MODEL),
    ]
    assert refusal(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_bentomls_own_client_calls_the_service(service):
    with on_a_port(service.app) as url, bentoml.SyncHTTPClient(url, server_ready_timeout=0) as client:
        answer = client.call("generate", prompt="x", max_tokens=2)
        body = answer if isinstance(answer, dict) else json.loads(answer)
        assert body["usage"]["generated_tokens"] == 2


def test_the_documentation_needs_no_other_host(client):
    page = client.get("/docs").text
    assert "https://" not in page and "http://" not in page
    for line in page.split('"'):
        if line.startswith("/docs/"):
            assert len(client.get(line).content) > 1000
    assert client.get("/redoc").url.path == "/docs"
    tag = client.get("/docs/swagger-ui.css").headers["etag"]
    assert client.get("/docs/swagger-ui.css", headers={"If-None-Match": f'"x", W/{tag}'}).status_code == 304
    for wrong in ("bytes=5-1", "bytes=9999999-", "lines=1-2", "x"):
        assert client.get("/docs/swagger-ui.css", headers={"Range": wrong}).status_code == 200
    assert refusal(client.get("/docs/../auth.py"), 404)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_stream_that_waits_sends_its_status_and_comments_until_its_text_comes(path, monkeypatch):
    monkeypatch.setattr(answers, "PING_S", 0.05)
    service = make_service(max_queue=8)
    service.engine.tokenizer.chat_template = CHAT_TEMPLATE
    service.close_gate()
    try:
        asked = {"json": {**GOOD[path], "stream": True}, "timeout": 60}
        with on_a_port(service.app) as url, httpx.stream("POST", url + path, **asked) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
            service.opened.set()
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    finally:
        service.opened.set()
        service.engine.stop()
