"""What must never reach the engine: each wrong value has its own 400, which names it."""

import json

import pytest
from starlette.testclient import TestClient

from bento.errors import ApiError
from bento.http.body import LONG_BODY, MAX_DEPTH, parse
from bento.openai.schema import MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS
from bento.schema import MAX_BIASES, MAX_STOP_IDS, MAX_STOP_LENGTH, MAX_STOPS
from bento.serving.backend import Backend
from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, refusal, running_service
from tests.support.tiny import CONTEXT

GENERATING = ["/v1/completions", "/v1/chat/completions", "/generate"]
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def service():
    with running_service(chat_template=CHAT_TEMPLATE, clamp_max_tokens=False, max_body_bytes=2 * LONG_BODY) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_submitted(monkeypatch) -> None:
    """The engine never sees a request that is refused."""
    monkeypatch.setattr(Backend, "submit", lambda *_: pytest.fail("the engine was asked"))


BAD_SAMPLING = [
    *[{"temperature": value} for value in (-1, 101, NAN, INFINITY, "1", True, [], 10**400)],
    *[{"top_p": value} for value in (-0.5, 1.01, NAN, True)],
    *[{"top_k": value} for value in (-2, 1.5, True, 2**31, 10**400, "3")],
    *[{"min_p": value} for value in (-0.1, 1.1, NAN)],
    *[{"repetition_penalty": value} for value in (0, -1, 101, 5e-324, INFINITY)],
    *[{"presence_penalty": value} for value in (-101, 101, NAN, "0")],
    *[{"frequency_penalty": value} for value in (-101, 101, NAN, False)],
    *[{"seed": value} for value in (-(2**63) - 1, 2**63, 1.5, "7", True)],
    *[{"min_tokens": value} for value in (-1, 3, 2**31, 0.5)],
    *[{"ignore_eos": value} for value in (1, "true")],
    *[{"stop": value} for value in ("", [""], 5, [5], [None], {"a": 1}, ["x"] * (MAX_STOPS + 1))],
    *[{"stop": value} for value in ("x" * (MAX_STOP_LENGTH + 1), ["x", "y" * (MAX_STOP_LENGTH + 1)])],
    *[{"stop_token_ids": value} for value in ([-1], [10_000], [True], ["1"], 5, [2] * (MAX_STOP_IDS + 1), [2**70])],
    *[{"logit_bias": value} for value in ({"x": 1}, {"-1": 1}, {"2": 101}, {"2": NAN}, {"2": "1"}, {"2": True}, [2])],
    *[{"logit_bias": value} for value in ({"10000": 1}, {"2": 1, "02": 1}, {"9" * 30: 1}, {"²": 1}, {"": 1})],
    {"logit_bias": {str(token): 0 for token in range(MAX_BIASES + 1)}},
    *[{"max_tokens": value} for value in (-2, 0, CONTEXT, 2**31, 10**400, 1.5, True, "2")],
    *[{"stream": value} for value in (1, "true", [])],
    {"color": "red"},
    {"x" * 500: 1},
    {"": 1},
]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("bad", BAD_SAMPLING, ids=lambda value: str(value)[:40])
def test_a_wrong_parameter_is_refused_by_name_on_every_route(service, path, bad):
    error = refusal(service.post(path, **{**GOOD[path], **bad}))
    (name,) = bad
    assert error["param"] == name[:64]
    assert name[:64] in error["message"] and len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        *[({"prompt": value}, "prompt") for value in (None, 5, {}, [], [[]], [[2], []], [True], [1.5])],
        *[
            ({"prompt": value}, "prompt")
            for value in (["x", 2], [[2], "x"], [[["x"]]], [-1], [10_000], [[2], [10**30]])
        ],
        ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": ["x"] * MAX_PROMPTS, "n": 2}, "n"),
        ({"prompt": [2] * CONTEXT}, "prompt"),
        ({"prompt": "x" * 2 * CONTEXT}, "prompt"),
        *[({"n": value}, "n") for value in (0, -1, MAX_CHOICES + 1, 1_000_000, 1.5, True, "2")],
        *[({"logprobs": value}, "logprobs") for value in (-1, MAX_LOGPROBS + 1, True, 1.5)],
        *[({"best_of": value}, "best_of") for value in (0, MAX_CHOICES + 1)],
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        *[({"echo": value}, "echo") for value in (1, "yes")],
        *[({"store": value}, "store") for value in (True, 0)],
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options"),
        ({"user": "x" * 513}, "user"),
        ({"user": 5}, "user"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"tools": [{}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_of_a_completion_is_refused_by_name(service, bad, param):
    error = refusal(service.post("/v1/completions", **{**GOOD["/v1/completions"], **bad}))
    assert error["param"] == param and len(error["message"]) < 300


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"messages": None}, "messages: expected a list"),
        ({"messages": [["x"]]}, "messages[0]: expected an object"),
        ({"stream": True, "stream_options": "x"}, 'stream_options is "x": expected an object'),
        ({"logit_bias": [[2, 1]]}, "logit_bias: expected an object"),
    ],
    ids=str,
)
def test_expected_types_are_named_in_the_terms_of_json(service, bad, expected):
    assert (
        refusal(service.post("/v1/chat/completions", **{**GOOD["/v1/chat/completions"], **bad}))["message"] == expected
    )


# Bodies that are not plain JSON, and the code of their refusal.
NOT_PLAIN = [
    (b"", "json_invalid"),
    (b"{", "invalid_json"),
    (b'{"prompt": x}', "invalid_json"),
    (b'{"prompt": "x"} {}', "invalid_json"),
    (b"\xff\xfe", "invalid_utf8"),
    (b'{"prompt": "\xed\xa0\x80"}', "invalid_utf8"),
    (b'{"prompt": "\\ud800"}', "invalid_unicode"),
    (b'{"\\udfff": 1}', "invalid_unicode"),
    (b'{"prompt": ["x", {"a": "\\uDC00"}]}', "invalid_unicode"),
    (b'["\\ud800"]', "invalid_unicode"),
    (b'{"prompt": "x", "prompt": "y"}', "duplicate_field"),
    (b'{"\\ud800": 1, "\\ud800": 2}', "duplicate_field"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "invalid_number"),
    (b"[" * 8000, "nested_too_deep"),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "nested_too_deep"),
    (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested_too_deep"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_another_model_is_a_404(service, path):
    error = refusal(service.post(path, **GOOD[path], model="gpt-9"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("content", "code"),
    NOT_PLAIN,
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("path", GOOD)
def test_the_refusal_of_a_body_that_is_not_plain_json_names_its_fault(service, path, content, code):
    answer = TestClient(service.app).post(path, content=content, headers={"content-type": "application/json"})
    error = refusal(answer)
    assert error["code"] in (code, "missing")  # no body at all


@pytest.mark.parametrize(("content", "code"), NOT_PLAIN[1:], ids=lambda value: str(value)[:40])
def test_the_refusal_of_a_long_body_that_is_not_plain_json_names_its_fault(content, code):
    with pytest.raises(ApiError) as refused:
        parse(b" " * LONG_BODY + content)
    # Of a body with two faults the one that the parser meets first is named.
    assert refused.value.content["error"]["code"] in (code, "invalid_unicode" if b"\\ud800" in content else code)


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5e-7, "é🦖\n", None, True]}, [[{"a": {"a": {}}}, {"a": 1}]], "x", 2**53]
)
def test_a_long_body_has_the_value_that_a_short_one_has(value):
    body = json.dumps(value).encode()
    assert parse(b" " * LONG_BODY + body) == parse(body) == value


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("bad", [{"model": 5}, {"color": "red"}, {"seed": 2**63}, {"user": ["x"]}], ids=str)
def test_a_long_body_is_refused_as_a_short_one(service, path, bad):
    client, body = TestClient(service.app), json.dumps({**GOOD[path], **bad}).encode()
    headers = {"content-type": "application/json"}
    short, long = (client.post(path, content=padding + body, headers=headers) for padding in (b"", b" " * LONG_BODY))
    assert refusal(short) == refusal(long)


def test_a_character_written_as_two_escapes_is_one(service):
    answer = TestClient(service.app).post(
        "/tokenize", content=b'{"prompt": "\\ud83e\\udd96"}', headers={"content-type": "application/json"}
    )
    assert answer.json()["tokens"] == service.engine.encode("🦖")


def test_a_refusal_never_repeats_what_a_user_wrote(service):
    secret = "my secret words"
    for bad in (
        {"prompt": {"a": secret}},
        {"prompt": secret, "stop": [secret] * 20},
        {"prompt": secret, "stop": {secret: 1}},
        {"prompt": secret, "max_tokens": CONTEXT},
        {"prompt": secret, "user": [secret]},
        {"prompt": secret, "suffix": secret},
    ):
        assert secret not in service.post("/v1/completions", **bad).text
    for content in ({secret: 1}, [{"type": secret}], [secret]):
        messages = [{"role": "user", "content": content}]
        assert secret not in service.post("/v1/chat/completions", messages=messages).text


def test_other_methods_and_paths_have_the_same_shape_of_error(service):
    client = TestClient(service.app)
    for path in GOOD:
        error = refusal(client.get(path), 405)
        assert error["code"] == "http_405"
        assert error["message"] == f'GET is not a method of "{path}": expected OPTIONS, POST'
        assert error["type"] == "invalid_request_error"
        encoded = client.post(path, content=b"x", headers={"content-encoding": "br"})
        assert refusal(encoded, 415)["type"] == "invalid_request_error"
    assert refusal(client.post("/v1/models", json={}), 405)
    for path in ("/v1/nothing", "/docs/nothing", "/page/nothing", "/" + "x" * 5000):
        error = refusal(client.get(path), 404)
        assert error["code"] == "http_404"
        assert error["message"].startswith(f'"{path[:64]}" is not a route') and len(error["message"]) < 200


@pytest.mark.parametrize("path", GOOD)
def test_an_empty_body_and_one_of_another_type_are_named(service, path):
    client = TestClient(service.app)
    body = json.dumps(GOOD[path]).encode()
    for kind in ("application/json", "text/plain", ""):
        assert "is empty" in refusal(client.post(path, content=b"", headers={"content-type": kind}))["message"]
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
    ):
        error = refusal(client.post(path, content=body, headers={"content-type": kind}))
        assert error["message"] == f'Content-Type is "{kind}": expected application/json'
    assert "Content-Type is missing" in refusal(client.post(path, content=body))["message"]
    for kind in (
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/vnd.api+json",
        "application/json;",
    ):
        wrong = json.dumps({**GOOD[path], "color": 1}).encode()  # read, so that its field is named
        assert refusal(client.post(path, content=wrong, headers={"content-type": kind}))["param"] == "color"
    assert refusal(client.post(path, json=[]))["message"] == "the body is not a JSON object"
