"""Structured output over HTTP, as the `openai` package and vLLM's clients ask for it."""

import json
import re
import threading
from collections.abc import Iterator

import openai
import pydantic
import pytest

from bento.openai.structured import MAX_GRAMMAR_LENGTH
from model.generation.grammar.grammar import GrammarCompiler
from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, events, on_a_port, refusal, running_service

MESSAGES = [{"role": "user", "content": "x"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE) as running:
        yield running


def is_answer(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"ok", "size"} and type(value["ok"]) is bool and value["size"] in (1, 2, 3)


def test_the_client_parses_its_own_classes(client):
    class Answer(pydantic.BaseModel):
        ok: bool
        size: int = pydantic.Field(ge=1, le=3)

    for seed in range(5):
        completion = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Answer, seed=seed)
        parsed = completion.choices[0].message.parsed
        assert isinstance(parsed, Answer) and completion.choices[0].finish_reason == "stop"


def test_every_choice_of_a_request_has_the_form(client):
    answers = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=8, seed=1, response_format=NAMED)
    texts = [choice.message.content for choice in answers.choices]
    assert all(is_answer(text) for text in texts) and len(set(texts)) > 1


def test_a_stream_is_the_whole_answer(client):
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 4, "response_format": NAMED}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop" and is_answer(whole.message.content)


def test_a_json_object_is_one_or_was_cut_off(client):
    for seed in range(12):
        choice = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=seed, response_format={"type": "json_object"}, top_p=0.9
        ).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"


FORMS = [
    ({"guided_regex": "[0-9]{3}-[xy]"}, "[0-9]{3}-[xy]"),
    ({"guided_choice": ["yes", "no", "größer"]}, "yes|no|größer"),
    ({"guided_grammar": 'root ::= "a" | "b" "c"'}, "a|bc"),
    ({"guided_grammar": 'start: "a" | "b" "c"'}, "a|bc"),
    ({"guided_json": {"enum": [True, 7]}}, "true|7"),
    ({"guided_json": '{"enum": [true, 7]}'}, "true|7"),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"structured_outputs": {"json": {"const": "x"}}}, '"x"'),
    ({"structured_outputs": {"grammar": 'start: "q"', "regex": None}}, "q"),
    ({"structured_outputs": {"json_object": True}}, r"\{.*"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}}, '"a"'),
    ({"response_format": {"type": "text"}, "guided_choice": ["z"]}, "z"),
    ({"response_format": {"type": "json_schema", "schema": {"enum": ["a"]}}}, '"a"'),
    ({"response_format": {"type": "json_object", "schema": {"const": "b"}}}, '"b"'),
]


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=[json.dumps(form) for form, _ in FORMS])
@pytest.mark.parametrize("route", ["completions", "chat"])
def test_every_form_holds_on_both_routes(client, form, pattern, route):
    if route == "chat":
        made = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, extra_body=form)
        text = made.choices[0].message.content
    else:
        made = client.completions.create(model=MODEL, prompt="x", max_tokens=40, extra_body=form)
        text = made.choices[0].text
    assert re.fullmatch(pattern, text, re.DOTALL), text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": NAMED["json_schema"]}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "schema": {}, "json_schema": NAMED["json_schema"]}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 5000 + "]" * 5000}, "guided_json"),
        ({"guided_json": '{"not":' * 49 + "{}" + "}" * 49}, "guided_json"),
        ({"guided_json": '{"const": 1' + "0" * 5000 + "}"}, "guided_json"),
        ({"guided_json": '{"type": "object", "type": "array"}'}, "guided_json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"$ref": "#"}, "stream": True}, "guided_json"),
        ({"guided_json": {"properties": {"a": {"$ref": "#/properties/a"}}, "type": "object"}}, "guided_json"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
                    },
                },
                "stream": True,
            },
            "response_format",
        ),
        ({"guided_grammar": 'start: "a" start'}, "guided_grammar"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_LENGTH + 1)}, "guided_regex"),
        ({"guided_json": {"enum": ["a" * MAX_GRAMMAR_LENGTH]}}, "guided_json"),
        ({"guided_choice": []}, None),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_grammar": "start: gone"}, "guided_grammar"),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "stream": True, "structured_outputs": {"regex": "b"}}, "guided_regex"),
    ],
    ids=lambda value: json.dumps(value)[:80],
)
def test_a_wrong_form_is_refused_by_name(service, body, param):
    asked = {"messages": MESSAGES, "max_tokens": 3, **body}
    with running_service(chat_template=CHAT_TEMPLATE, max_body_bytes=1 << 20) as roomy:
        answer = roomy.post("/v1/chat/completions", **asked)
    if param is None:  # an empty list has no effect
        assert answer.status_code == 200
    else:
        assert refusal(answer)["param"] == param


def test_a_grammar_too_costly_for_one_token_is_the_requests_fault(service):
    grammar = {"guided_grammar": 'start: e\ne: e e e | e e | "a" | "b"', "min_tokens": 90, "max_tokens": 90}
    error = refusal(service.post("/v1/completions", prompt="x", **grammar))
    assert error["code"] == "grammar_too_complex" and "simplify" in error["message"]


def test_log_probabilities_of_a_constrained_text_align_with_it(client):
    choice = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=NAMED, logprobs=True, top_logprobs=2, temperature=0
    ).choices[0]
    assert "".join(score.token for score in choice.logprobs.content) == choice.message.content
    # The model's own, before the grammar: its favorites are others than the tokens it was made to take.
    assert any(score.token not in [top.token for top in score.top_logprobs] for score in choice.logprobs.content)


def test_other_requests_go_on_while_a_grammar_compiles(service, monkeypatch):
    compiling, compiled = threading.Event(), threading.Event()
    template = GrammarCompiler._template

    def slow(self, kind, source):
        compiling.set()
        assert compiled.wait(30)
        return template(self, kind, source)

    monkeypatch.setattr(GrammarCompiler, "_template", slow)
    answers = []
    asked = {"prompt": "x", "guided_regex": "held[0-9]", "max_tokens": 30}
    waiting = threading.Thread(target=lambda: answers.append(client.completions.create(model=MODEL, **extra(asked))))
    with on_a_port(service.app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        waiting.start()
        assert compiling.wait(30)
        assert client.completions.create(model=MODEL, prompt="y", max_tokens=5).usage.completion_tokens == 5
        compiled.set()
        waiting.join()
    assert re.fullmatch("held[0-9]", answers[0].choices[0].text)


def extra(body: dict) -> dict:
    return {
        "prompt": body["prompt"],
        "max_tokens": body["max_tokens"],
        "extra_body": {"guided_regex": body["guided_regex"]},
    }


def test_deep_schemas_are_read(service):
    schema: dict = {"type": "integer", "minimum": 1, "maximum": 2}
    for _ in range(8):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    answer = service.post("/v1/completions", prompt="x", max_tokens=80, guided_json=schema, seed=1).json()
    assert answer["choices"][0]["text"].lstrip().startswith("{")


def test_a_stream_of_completions_has_the_form(service):
    body = {"prompt": ["x", "y"], "n": 2, "stream": True, "guided_choice": ["left", "right"], "max_tokens": 20}
    texts: dict[int, str] = {}
    for chunk in events(service.post("/v1/completions", **body).text):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert len(texts) == 4 and set(texts.values()) <= {"left", "right"}
