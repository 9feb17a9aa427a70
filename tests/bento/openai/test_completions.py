"""/v1/completions: prompts in every form, what a choice shows, streams, and that each parameter does what it says."""

import pytest

from bento.serving.backend import SHORT_TEXT
from tests.bento.openai_service import IS_VLLM, MODEL, Service, events, refusal, running_service
from tests.support.tiny import CONTEXT

PATH = "/v1/completions"
GREEDY = {"prompt": "def main", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def service():
    with running_service() as running:
        yield running


def complete(service: Service, **body) -> dict:
    answer = service.post(PATH, **{**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(service: Service, **body) -> str:
    return complete(service, **body)["choices"][0]["text"]


def joined(chunks: list[dict], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def test_an_answer_has_the_shape_of_the_openai_api(service):
    answer = service.post(PATH, **GREEDY, model=MODEL)
    body = answer.json()
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert body["object"] == "text_completion" and body["model"] == MODEL
    assert body["id"] == f"cmpl-{answer.headers['x-request-id']}"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "finish_reason", "logprobs"}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    used = body["usage"]
    assert used["completion_tokens"] == 12
    assert used["total_tokens"] == used["prompt_tokens"] + 12


def test_the_text_is_that_of_generate_for_the_same_request(service):
    request = {**GREEDY, "temperature": 0.8, "seed": 3}
    assert service.post("/generate", **request).json()["text"] == text(service, **request)


def test_a_prompt_is_a_text_or_tokens_or_several_of_them(service):
    ids = service.engine.encode(GREEDY["prompt"])
    alone = text(service)
    assert text(service, prompt=ids) == alone
    for several in (["x", GREEDY["prompt"]], [service.engine.encode("x"), ids]):
        body = complete(service, prompt=several)
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["choices"][1]["text"] == alone
        assert body["usage"]["prompt_tokens"] == 1 + len(ids)
        assert body["usage"]["completion_tokens"] == 24


def test_special_tokens_written_out_in_a_prompt_are_text(service):
    used = complete(service, prompt="<|endoftext|>")["usage"]
    assert used["prompt_tokens"] == len(service.engine.encode("<|endoftext|>")) > 1


def test_a_long_text_is_tokenized_elsewhere_and_refused_for_its_length(service):
    assert refusal(service.post(PATH, prompt="x" * (SHORT_TEXT + 1)))["code"] == "context_length_exceeded"


def test_max_tokens_defaults_to_sixteen_or_as_many_as_fit(service):
    assert complete(service, max_tokens=None)["usage"]["completion_tokens"] == 16
    full = [2] * (CONTEXT - 5)
    assert complete(service, prompt=full, max_tokens=None)["usage"]["completion_tokens"] == 5


def test_choices_of_a_prompt_are_the_seeds_that_follow(service):
    request = {"temperature": 1.0, "max_tokens": 20}
    body = complete(service, **request, seed=5, n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [text(service, **request, seed=seed) for seed in (5, 6, 7)]
    assert body["usage"]["prompt_tokens"] == len(service.engine.encode(GREEDY["prompt"]))
    assert body["usage"]["completion_tokens"] == 60
    several = complete(service, **request, seed=5, n=2, prompt=["x", GREEDY["prompt"]])
    assert [choice["text"] for choice in several["choices"]][2:] == texts[:2]


def test_a_prefix_that_was_computed_before_shows_in_the_usage(service):
    prompt = list(range(2, 2 + 80))
    first = complete(service, prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
    again = complete(service, prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first < 16 < again < 80


def test_echo_begins_the_text_with_the_prompt(service):
    continued = text(service)
    assert text(service, echo=True) == GREEDY["prompt"] + continued
    ids = service.engine.encode(GREEDY["prompt"])
    assert text(service, prompt=ids, echo=True) == GREEDY["prompt"] + continued
    assert text(service, echo=True, max_tokens=0) == GREEDY["prompt"]
    assert joined(events(service.post(PATH, **GREEDY, echo=True, stream=True).text)) == GREEDY["prompt"] + continued
    nothing = events(service.post(PATH, **{**GREEDY, "max_tokens": 0}, echo=True, stream=True).text)
    assert joined(nothing) == GREEDY["prompt"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_gives_the_same_texts_and_one_finish_for_each_choice(service, n):
    request = {**GREEDY, "temperature": 0.9, "seed": 4, "max_tokens": 40, "n": n}
    whole = complete(service, **request)
    answer = service.post(PATH, **request, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert {(chunk["object"], chunk["id"]) for chunk in chunks} == {("text_completion", chunks[0]["id"])}
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"]) == choice["text"]
        ends = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert ends[-1] == "length" and set(ends[:-1]) == {None}


def test_a_stream_shows_the_usage_at_its_end_or_all_along(service):
    request = {**GREEDY, "stream": True}
    usage = complete(service)["usage"]
    *chunks, last = events(service.post(PATH, **request, stream_options={"include_usage": True}).text)
    assert last["choices"] == [] and {**usage, "prompt_tokens_details": {}} == {
        **last["usage"],
        "prompt_tokens_details": {},
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    *chunks, last = events(service.post(PATH, **request, stream_options={"continuous_usage_stats": True}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in [*chunks, last]]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12


def test_a_seed_makes_a_text_reproducible_and_no_seed_does_not(service):
    request = {"temperature": 1.0, "max_tokens": 30}
    assert text(service, **request, seed=1) == text(service, **request, seed=1) != text(service, **request, seed=2)
    assert text(service, **request) != text(service, **request)


def test_filters_that_leave_one_token_make_sampling_greedy(service):
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert text(service, temperature=1.0, **narrow) == text(service)


def test_penalties_and_biases_change_what_is_chosen(service):
    plain = complete(service, return_token_ids=True, max_tokens=40)["choices"][0]["token_ids"]
    largest = 2.0 if IS_VLLM else 100.0  # vLLM takes OpenAI's range and refuses others
    for change in (
        {"repetition_penalty": 50.0},
        {"presence_penalty": largest},
        {"frequency_penalty": largest},
        {"logit_bias": {str(plain[0]): -100}},
    ):
        changed = complete(service, return_token_ids=True, max_tokens=40, **change)["choices"][0]["token_ids"]
        assert changed != plain, change
    only = complete(service, return_token_ids=True, logit_bias={"70": 100})["choices"][0]["token_ids"]
    assert only == [70] * 12


def test_a_stop_string_ends_the_text_before_it_and_takes_its_tokens_with_it(service):
    whole = text(service, logit_bias={"70": 100, "71": 99})
    letter = whole[0]
    stopped = complete(service, logit_bias={"70": 100}, stop=[letter * 3], min_tokens=6, logprobs=0)["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert len(stopped["text"]) == len(stopped["logprobs"]["tokens"]) == 3
    streamed = events(service.post(PATH, **GREEDY, logit_bias={"70": 100}, stop=letter * 3, stream=True).text)
    assert joined(streamed) == "" and streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(service):
    ids = complete(service, return_token_ids=True)["choices"][0]["token_ids"]
    stopped = complete(service, return_token_ids=True, stop_token_ids=[ids[5]])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == ids[: ids.index(ids[5])]


def test_the_end_of_text_token_ends_a_text_unless_it_is_ignored():
    with running_service(stops=True) as service:
        (end,) = service.engine.end_of_text_ids
        bias = {str(end): 100}
        ended = complete(service, logit_bias=bias)
        assert ended["choices"][0]["finish_reason"] == "stop" and ended["choices"][0]["text"] == ""
        assert ended["usage"]["completion_tokens"] == 1
        assert complete(service, logit_bias=bias, min_tokens=5)["usage"]["completion_tokens"] == 6
        ignored = complete(service, logit_bias=bias, ignore_eos=True, return_token_ids=True)["choices"][0]
        assert ignored["finish_reason"] == "length" and ignored["token_ids"] == [end] * 12


def test_token_ids_show_prompt_and_text_in_answers_and_streams(service):
    ids = service.engine.encode(GREEDY["prompt"])
    whole = complete(service, return_token_ids=True)["choices"][0]
    assert whole["prompt_token_ids"] == ids
    assert len(whole["token_ids"]) == 12 and service.engine.decode(whole["token_ids"]) == whole["text"]
    chunks = events(service.post(PATH, **GREEDY, return_token_ids=True, stream=True).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["prompt_token_ids"] == ids and "prompt_token_ids" not in choices[1]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]


def test_logprobs_name_each_token_where_it_begins(service):
    choice = complete(service, prompt="日本 def", logprobs=2, echo=True)["choices"][0]
    scores = choice["logprobs"]
    assert {len(values) for values in scores.values()} == {12 + len(service.engine.encode("日本 def"))}
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for token, logprob, top, offset in list(zip(*scores.values(), strict=True))[1:]:
        assert logprob <= 0 and top[token] == logprob and 2 <= len(top) <= 3
        assert max(top.values()) >= logprob
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    assert scores["tokens"][:3] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"] and scores["text_offset"][:4] == [
        0,
        0,
        0,
        1,
    ]


def test_streamed_logprobs_are_those_of_the_whole(service):
    request = {**GREEDY, "prompt": "größer 日", "logprobs": 3, "echo": True, "max_tokens": 30}
    whole = complete(service, **request)["choices"][0]
    chunks = events(service.post(PATH, **request, stream=True).text)
    assert joined(chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        streamed = [v for c in chunks if c["choices"][0]["logprobs"] for v in c["choices"][0]["logprobs"][name]]
        if name in ("tokens", "text_offset"):
            assert streamed == values
        elif name == "token_logprobs":
            assert streamed[1:] == pytest.approx(values[1:], abs=1e-4)


def test_labels_of_the_caller_change_nothing(service):
    labels = {
        "user": "someone",
        "metadata": {"project": "x"},
        "safety_identifier": "a",
        "prompt_cache_key": "b",
        "service_tier": "auto",
        "store": False,
        "suffix": "",
        "best_of": 1,
    }
    assert text(service, **labels) == text(service)
    nulls = dict.fromkeys((*labels, "temperature", "top_p", "n", "stop", "logit_bias", "logprobs", "seed", "echo"))
    assert complete(service, **{**nulls, "temperature": 0})["choices"][0]["text"] == text(service)


def test_models_are_the_served_one(service):
    from starlette.testclient import TestClient

    client = TestClient(service.app)
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", CONTEXT)
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert refusal(client.get("/v1/models/other/one"), 404)["code"] == "model_not_found"


def test_tokenize_and_detokenize_are_inverse(service):
    words = "größer <|endoftext|> 日本語"
    body = service.post("/tokenize", prompt=words, return_token_strs=True).json()
    assert body["tokens"] == service.engine.encode(words)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == CONTEXT
    assert service.post("/detokenize", tokens=body["tokens"]).json() == {"prompt": words}
    assert service.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert refusal(service.post("/detokenize", tokens=[10_000]))["param"] == "tokens"
