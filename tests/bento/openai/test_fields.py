"""Fields that vLLM's clients send besides OpenAI's: each does what its name says, or is refused."""

import json
from collections.abc import Iterator

import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, Service, events, refusal, running_service
from tests.support.tiny import CONTEXT

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE) as running:
        yield running


def complete(service: Service, **body) -> dict:
    answer = service.post("/v1/completions", **{"prompt": "def main", "max_tokens": 30, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(service: Service, **body) -> str:
    return complete(service, **body)["choices"][0]["text"]


def test_bad_words_never_appear_however_they_are_spelled(service):
    for seed in range(8):
        sampling = {"temperature": 1.0, "seed": seed}
        free = text(service, **sampling)
        # Every string of one to three characters of what it would have said.
        for size in (1, 2, 3):
            words = sorted(
                {
                    free[at : at + size]
                    for at in range(min(len(free) - size, 20))
                    if "\ufffd" not in free[at : at + size]
                }
            )
            banned = text(service, bad_words=words, **sampling)
            assert not [word for word in words if word in banned]


def test_only_allowed_tokens_are_chosen_and_seeds_hold(service):
    ids = [70, 80, 90]
    answer = complete(service, allowed_token_ids=ids, return_token_ids=True, temperature=1.0, seed=5)
    chosen = answer["choices"][0]["token_ids"]
    assert len(chosen) == 30 and set(chosen) <= set(ids) and len(set(chosen)) > 1
    again = complete(service, allowed_token_ids=ids, return_token_ids=True, temperature=1.0, seed=5)
    assert again["choices"][0]["token_ids"] == chosen


def test_a_stop_string_stays_in_the_text_where_that_is_asked_for(service):
    free = text(service)
    stop = next(free[at : at + 3] for at in range(6, len(free) - 3) if "\ufffd" not in free[at : at + 3])
    without = text(service, stop=stop)
    whole = complete(service, stop=stop, include_stop_str_in_output=True, logprobs=0)["choices"][0]
    assert whole["text"] == without + stop and whole["finish_reason"] == "stop"
    assert stop in "".join(whole["logprobs"]["tokens"][-4:])
    body = {"prompt": "def main", "max_tokens": 30, "temperature": 0, "stop": stop, "include_stop_str_in_output": True}
    streamed = events(service.post("/v1/completions", stream=True, **body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole["text"]


def test_a_stop_tokens_text_stays_where_that_is_asked_for(service):
    ids = complete(service, return_token_ids=True)["choices"][0]["token_ids"]
    token = next(token for at, token in enumerate(ids) if at > 3 and token not in ids[:at])
    data = service.engine.token_bytes[token]
    with_it = complete(service, stop_token_ids=[token], include_stop_str_in_output=True, return_token_ids=True)
    without = complete(service, stop_token_ids=[token], return_token_ids=True)
    assert with_it["choices"][0]["token_ids"][-1] == token and without["choices"][0]["token_ids"][-1] != token
    assert len(with_it["choices"][0]["text"].encode()) >= len(data) and with_it["usage"] == without["usage"]


def test_a_truncated_prompt_is_its_end(service):
    long = "def main(): return " * 40
    ids = service.post("/tokenize", prompt=long).json()["tokens"]
    assert refusal(service.post("/v1/completions", prompt=long, max_tokens=4))["code"] == "context_length_exceeded"
    cut = complete(service, prompt=long, truncate_prompt_tokens=10, max_tokens=4, return_token_ids=True)
    assert cut["choices"][0]["prompt_token_ids"] == ids[-10:] and cut["usage"]["prompt_tokens"] == 10
    all_that_fits = complete(service, prompt=long, truncate_prompt_tokens=-1, max_tokens=4)
    assert all_that_fits["usage"]["prompt_tokens"] == CONTEXT - 4
    echoed = complete(service, prompt=long, truncate_prompt_tokens=3, max_tokens=1, echo=True)
    assert echoed["choices"][0]["text"].startswith(service.engine.decode(ids[-3:]))
    chat = service.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": long}], truncate_prompt_tokens=20, max_tokens=2
    )
    assert chat.json()["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_log_probabilities_of_the_prompt_are_those_of_an_echo(service, path):
    prompt = {"prompt": "def main"} if path == "/v1/completions" else {"messages": MESSAGES}
    answer = service.post(path, max_tokens=2, prompt_logprobs=2, return_token_ids=True, **prompt).json()
    (choice,) = answer["choices"]
    shown = (choice if path == "/v1/completions" else answer)["prompt_logprobs"]
    ids = choice["prompt_token_ids"]
    echoed = complete(service, prompt=ids, max_tokens=1, echo=True, logprobs=2)["choices"][0]["logprobs"]
    assert shown[0] is None and len(shown) == len(ids)
    for place, token, logprob in zip(shown[1:], ids[1:], echoed["token_logprobs"][1:], strict=False):
        assert place[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-3)
        ranks = sorted(one["rank"] for one in place.values() if one["rank"])
        assert ranks == [1, 2] and len(place) in (2, 3)


def test_the_best_of_several_texts_is_the_likeliest_on_average(service):
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
    drawn = complete(service, n=6, logprobs=0, **sampling)
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in drawn["choices"]]
    order = sorted(range(6), key=lambda index: -means[index])
    best = complete(service, best_of=6, n=2, **sampling)
    assert [choice["text"] for choice in best["choices"]] == [drawn["choices"][index]["text"] for index in order[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1] and best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == drawn["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x" * 300]}, "bad_words"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"bad_words": ["x"], "guided_choice": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5], "guided_choice": ["x"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [10_000]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 3}, "prompt_logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_cannot_be_done_is_refused_by_name(service, body, param):
    assert refusal(service.post("/v1/completions", prompt="x", max_tokens=2, **body))["param"] == param


def test_values_that_ask_for_nothing_change_nothing(service):
    nothing = {"bad_words": [], "allowed_token_ids": [], "include_stop_str_in_output": False, "prompt_logprobs": False}
    assert text(service, **nothing, best_of=1, truncate_prompt_tokens=None) == text(service)
