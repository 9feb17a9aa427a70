"""Neutral values are accepted: explicit defaults, empty values, labels, and values that mean "off" elsewhere."""

from typing import Any

import pytest

from bento.neutral import EXTRAS, NEUTRAL, PENALTIES, SUBORDINATE
from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, refusal, running_service
from tests.support.tiny import CONTEXT

PATHS = {
    "/v1/completions": {"prompt": "x", "max_tokens": 4, "seed": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "seed": 3},
    "/generate": {"prompt": "x", "max_tokens": 4, "seed": 3},
}


@pytest.fixture(scope="module")
def service():
    with running_service(chat_template=CHAT_TEMPLATE) as running:
        yield running


def answer(service, path: str, **more: Any) -> list[str]:
    """Texts of an answer of status 200."""
    got = service.post(path, **{**PATHS[path], **more})
    assert got.status_code == 200, got.text
    body = got.json()
    if "choices" not in body:
        return [body["text"]]
    return [one.get("text") if "text" in one else one["message"]["content"] for one in body["choices"]]


SAME: list[dict[str, Any]] = [
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 0.0},
    {"top_p": 1.0},
    {"top_p": 1},
    {"min_p": 0},
    {"temperature": 1},
    {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"max_tokens": 4.0},
    {"seed": 3.0},
    {"min_tokens": 0.0},
    {"stop": None, "stop_token_ids": [], "logit_bias": {}},
    {"stop": []},
    {"ignore_eos": False},
    {"something": None},
    {"something": []},
    {"something": {}},
    {"guided_json": None, "guided_choice": None, "structured_outputs": None, "bad_words": []},
    {"no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "skip_special_tokens": True},
    {"rid": "abc", "request_id": "x", "priority": 0, "lora_path": None},
    {"mirostat": 0, "typical_p": 1.0, "repeat_penalty": 1.0, "cache_prompt": True},
    {"mirostat": 0.0, "typical_p": 1, "priority": 0.0, "dry_multiplier": 0, "num_beams": 1.0},
    {"logit_bias": [], "stop": {}, "stop_token_ids": {}, "bad_words": {}, "allowed_token_ids": {}},
    {"user_id": "u", "conversation_id": 7, "thread_id": "t", "extra_key": "k", "run_id": "r"},
    {"something": "", "more": {"a": None, "b": {"c": ""}}},
    {"kv_transfer_params": {"do_remote_decode": False, "do_remote_prefill": False, "remote_engine_id": None}},
    {"options": {"mirostat": 0, "tfs_z": 1, "repeat_last_n": 64, "use_mmap": True}, "session_params": {"id": None}},
    {"reasoning_content": "", "thinking_budget": 0, "web_search": False, "provider": {"order": []}},
    {
        "provider": {"allow_fallbacks": True, "sort": "price", "data_collection": "deny"},
        "reasoning": {"effort": "none"},
    },
    {"rep_pen_range": 512, "rep_pen_slope": 0.7, "rep_pen": 1.0, "dynatemp_low": 0.5, "dynamic_temperature": False},
    {"return_something": False, "enable_search": False, "use_default_badwordsids": False},
    {"num_thread": 4, "num_gpu": 0, "litellm_session_id": "s", "cache_control": {"type": "ephemeral"}},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("more", SAME, ids=str)
def test_a_neutral_value_changes_no_answer_on_any_route(service, path, more):
    assert answer(service, path, **more) == answer(service, path)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("empty", [[], {}], ids=str)
def test_an_empty_list_and_an_empty_object_are_equally_neutral(service, path, empty):
    names = ["metadata", "stream_options", "response_format", "structured_outputs", "guided_choice", "logit_bias"]
    names += ["tools", "tool_choice", "functions", "modalities", "chat_template_kwargs"] if "chat" in path else []
    assert answer(service, path, **dict.fromkeys(names, empty)) == answer(service, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "more",
    [
        {"something": [{}]},
        {"something": {"a": {"b": 0}}},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"options": {"mirostat": 2}},
        {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}},
        {"priority": False},
        {"watermark": 0},
        {"color": 0},
        {"color": False},
        {"enable_search": True},
        {"return_something": 0},
        {"provider": {"order": ["a"]}},
        {"cache_control": {"type": "permanent"}},
    ],
    ids=str,
)
def test_values_that_are_not_neutral_are_refused_by_name(service, path, more):
    (name,) = more
    assert refusal(service.post(path, **PATHS[path], **more))["param"] == name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("most", [2**31, 2**32 - 1, 2**53 - 1, 2**63 - 1, 1e9, 1e18])
def test_the_largest_integers_of_other_languages_mean_all_that_fits(service, path, most):
    assert answer(service, path, max_tokens=most) == answer(service, path, max_tokens=-1)
    if path != "/generate":
        other = {**PATHS[path], "max_tokens": None, "max_completion_tokens": most}
        assert service.post(path, **other).json()["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: [ids], lambda ids: [ids, [2]]])
def test_tokens_may_be_written_with_a_decimal_point(service, form):
    path, ids = "/v1/completions", [70, 71, 72]
    floats = [70.0, 71, 72.0]
    assert answer(service, path, prompt=form(floats)) == answer(service, path, prompt=form(ids))
    vectors = [service.post("/v1/embeddings", input=form(one)).json()["data"] for one in (floats, ids)]
    assert vectors[0] == vectors[1]
    for name in ("stop_token_ids", "allowed_token_ids"):
        assert answer(service, path, **{name: floats}) == answer(service, path, **{name: ids})
    assert service.post("/detokenize", tokens=floats).json() == service.post("/detokenize", tokens=ids).json()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_each_neutral_value_is_taken_and_another_is_refused_by_name(service, path, name):
    for value in NEUTRAL[name]:
        assert answer(service, path, **{name: value}) == answer(service, path)
    if name not in ("add_special_tokens", "cache_prompt", "echo", "logprobs", "top_logprobs", "best_of"):
        assert refusal(service.post(path, **PATHS[path], **{name: "other"}))["param"] == name


@pytest.mark.parametrize("path", PATHS)
def test_a_switch_of_an_extra_is_taken_while_it_is_off(service, path):
    off = {f"{beginning}it": False for beginning in EXTRAS}
    assert answer(service, path, **off) == answer(service, path)
    for name in off:
        assert refusal(service.post(path, **PATHS[path], **{name: True}))["param"] == name


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_parameters_of_other_routes_are_taken_while_they_are_off(service, path):
    off = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_p": 0, "min_tokens": 0}
    got = service.post(path, **GOOD[path], **off, ignore_eos=False, n=1, logprobs=False, tools=[], tool_choice=None)
    assert got.status_code == 200, got.text
    for name in off:
        assert refusal(service.post(path, **GOOD[path], **{name: 0.5}))["param"] == name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SUBORDINATE)
def test_a_field_that_shapes_another_is_taken_while_that_one_is_off(service, path, name):
    for value in (0, 0.5, -1, True, ["x"]):
        assert answer(service, path, **{name: value}) == answer(service, path)
    for other in SUBORDINATE[name]:
        off, on = PENALTIES[other] if other in PENALTIES else NEUTRAL[other][0], 1.5
        assert answer(service, path, **{name: 5, other: off}) == answer(service, path)
        assert refusal(service.post(path, **PATHS[path], **{name: 5, other: on}))["param"] in (name, other)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "more",
    [
        {"id_slot": -1, "speculative.n_max": 16, "session_id": "s", "chat_id": "c", "reasoning_format": "auto"},
        {"num_ctx": None, "options": {}, "images": [], "context": []},
        {"stream": None, "usage": {"include": False}},
    ],
    ids=str,
)
def test_defaults_of_other_servers_and_routers_are_accepted_on_any_route(service, path, more):
    assert answer(service, path, **more) == answer(service, path)


def test_the_other_routes_name_of_the_text_may_be_null_and_no_more(service):
    for path, other in (("/v1/completions", "messages"), ("/v1/chat/completions", "prompt")):
        assert answer(service, path, **{other: None}) == answer(service, path)
        for value in ("", [], "x"):
            assert refusal(service.post(path, **PATHS[path], **{other: value}))["param"] == other


def test_options_of_a_stream_that_ask_for_nothing_are_taken_without_one(service):
    for options in ({"include_usage": False}, {"include_usage": None, "continuous_usage_stats": False}):
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert answer(service, path, stream_options=options, model="") == answer(service, path)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "input_text", "text": "c"}],
        [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
        [{"type": "refusal", "refusal": "c"}],
        [{"type": "text", "text": "c", "id": "1", "something": None}],
    ],
    ids=str,
)
def test_a_part_of_any_type_that_is_text_is_its_text(service, content):
    path = "/v1/chat/completions"
    plain = answer(service, path, messages=[{"role": "user", "content": "c"}])
    assert answer(service, path, messages=[{"role": "user", "content": content}]) == plain
    joined = [{"role": "user", "content": [*content, {"type": "text", "text": "d"}]}]
    assert answer(service, path, messages=joined) == answer(
        service, path, messages=[{"role": "user", "content": "c\nd"}]
    )


@pytest.mark.parametrize(
    "part",
    [
        "x",
        5,
        None,
        {},
        {"text": "x"},
        {"type": "text"},
        {"type": ["text"], "text": "x"},
        {"type": "refusal", "text": "x"},
        {"type": "input_text", "text": 5},
        {"type": "text", "text": "x", "color": 1},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {}},
    ],
    ids=str,
)
def test_a_part_that_is_no_text_is_refused(service, part):
    error = refusal(
        service.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
        )
    )
    assert error["param"] == "messages" and "the model reads text" in error["message"]


def test_a_result_of_a_tool_follows_a_call(service):
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    for before in ([], [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]):
        error = refusal(service.post("/v1/chat/completions", messages=[*before, result], max_tokens=2))
        assert error["param"] == "messages" and "not one for each call" in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"best_of": 1, "n": 1, "suffix": "", "echo": False, "logprobs": False, "stream": False},
        {"max_completion_tokens": 4},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s"},
        {"stream_options": {}},
        {"tools": [], "messages_of_nobody": None},
    ],
    ids=str,
)
def test_what_completions_spell_out_is_taken(service, more):
    assert answer(service, "/v1/completions", **more) == answer(service, "/v1/completions")


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [], "functions": [], "tool_choice": "none", "parallel_tool_calls": None},
        {"verbosity": "medium", "reasoning_effort": "none", "thinking": {"type": "disabled"}, "think": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "top_logprobs": 0, "logprobs": False},
        {"add_generation_prompt": True, "continue_final_message": False, "best_of": 1, "echo": False},
        {"chat_template_kwargs": {}, "documents": [], "chat_template": None},
        {"tool_choice": "auto", "parallel_tool_calls": False, "function_call": "auto"},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True},
    ],
    ids=str,
)
def test_what_chats_spell_out_is_taken(service, more):
    assert answer(service, "/v1/chat/completions", **more) == answer(service, "/v1/chat/completions")


HISTORY = [
    {"refusal": None, "audio": None, "annotations": [], "tool_calls": [], "function_call": None},
    {"reasoning_content": "because", "reasoning": None, "id": "msg_1", "timestamp": 1, "type": None},
    {"name": "bot", "provider_specific_fields": {"a": 1}, "cache_control": {"type": "ephemeral"}},
]


@pytest.mark.parametrize("extra", HISTORY, ids=str)
def test_a_history_from_another_server_is_taken(service, extra):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    plain = answer(service, "/v1/chat/completions", messages=turns)
    turns[1] = {**turns[1], **extra}
    assert answer(service, "/v1/chat/completions", messages=turns) == plain
    turns[2] = {"role": "user", "content": [{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}]}
    assert answer(service, "/v1/chat/completions", messages=turns) == plain


def test_an_answer_without_content_is_an_empty_one(service):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "c"}]
    empty = [turns[0], {"role": "assistant", "content": ""}, turns[2]]
    path = "/v1/chat/completions"
    assert answer(service, path, messages=turns) == answer(service, path, messages=empty)


@pytest.mark.parametrize("path", PATHS)
def test_top_p_of_zero_takes_the_most_likely_token(service, path):
    assert answer(service, path, top_p=0) == answer(service, path, temperature=0)


@pytest.mark.parametrize("path", PATHS)
def test_a_seed_of_minus_one_draws_one_and_other_negative_seeds_are_seeds(service, path):
    assert len({tuple(answer(service, path, seed=-1)) for _ in range(8)}) > 1
    assert answer(service, path, seed=-5) == answer(service, path, seed=-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wanted", [-1, CONTEXT, 10 * CONTEXT])
def test_more_tokens_than_fit_are_as_many_as_fit(service, path, wanted):
    body = service.post(path, **{**PATHS[path], "max_tokens": wanted}).json()
    assert body["usage"]["total_tokens"] == CONTEXT
    assert (body["choices"][0] if "choices" in body else body)["finish_reason"] == "length"


def test_by_an_option_more_tokens_than_fit_are_refused_in_openais_sentence():
    with running_service(chat_template=CHAT_TEMPLATE, clamp_max_tokens=False) as strict:
        for path, body in PATHS.items():
            error = refusal(strict.post(path, **{**body, "max_tokens": CONTEXT}))
            assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
            assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, you")
            assert answer(strict, path, max_tokens=-1)


@pytest.mark.parametrize("path", PATHS)
def test_a_text_that_is_too_long_is_refused_without_a_name_that_was_not_sent(service, path):
    long = "x" * 5 * CONTEXT
    body = {"messages": [{"role": "user", "content": long}]} if "chat" in path else {"prompt": long}
    for more in ({}, {"max_tokens": 3}):
        error = refusal(service.post(path, **body, **more))
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, ")
        assert "max_completion_tokens" not in error["message"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", ["", "x"]])
def test_an_empty_prompt_begins_a_text(service, prompt):
    texts = answer(service, "/v1/completions", prompt=prompt)
    start = min(service.engine.end_of_text_ids, default=0)
    assert texts[0] == answer(service, "/v1/completions", prompt=[start])[0]
    assert answer(service, "/v1/completions", prompt="", echo=True)[0] == texts[0]
