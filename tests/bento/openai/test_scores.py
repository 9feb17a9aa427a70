"""Scores through HTTP are the model's own: log-likelihoods by /v1/completions, as evaluation harnesses ask for them."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bento.openai import routes
from bento.openai.logprobs import PositionedToken, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from model.generation.sampler import token_logprobs
from tests.bento.openai_service import CHAT_TEMPLATE, IS_VLLM, Service, events, running_service
from tests.support.graphs import EVERY_STEP, use_graphs_on_cpu

TEXTS = ["def main():\n    return 'größer'", "日本語 🦖 if print", "x" * 40, "else None\n"]


@pytest.fixture(scope="module")
def service():
    with running_service(stops=True) as running:
        yield running


def log_probabilities(service: Service, ids: list[int]) -> torch.Tensor:
    """Of every token after the first, under the model, shape (T - 1, V)."""
    with torch.inference_mode():
        return service.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_prompts_are_scored_as_the_model_scores_them(service, max_tokens):
    prompts = [service.engine.encode(text) for text in TEXTS]
    answer = service.post(
        "/v1/completions", prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1
    )
    assert answer.status_code == 200, answer.text
    for ids, choice in zip(prompts, answer.json()["choices"], strict=True):
        expected_TV = log_probabilities(service, ids)
        expected = expected_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        scores = choice["logprobs"]
        assert len(scores["tokens"]) == len(ids) + max_tokens
        assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in scores["top_logprobs"][1 : len(ids)]]
        assert best == pytest.approx(expected_TV.max(dim=-1).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_scored_prompt_has_one_more_token_even_where_it_ends_the_text(service, stream):
    (end,) = service.engine.end_of_text_ids
    request = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    asked = {**request, "logit_bias": {str(end): 100}}
    answer = service.post("/v1/completions", **asked, stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(answer.text)]
        tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        tokens, reason = choice["logprobs"]["tokens"], choice["finish_reason"]
        assert choice["text"] == service.engine.decode([5, 6, 7])
        assert answer.json()["usage"]["completion_tokens"] == 1
    assert len(tokens) == 4 and tokens[-1] == "<|endoftext|>"
    assert reason == "stop"
    stop_token = service.post("/v1/completions", **request, logit_bias={"70": 100}, stop_token_ids=[70]).json()
    assert len(stop_token["choices"][0]["logprobs"]["tokens"]) == 4
    assert stop_token["choices"][0]["finish_reason"] == "stop"


def test_generated_tokens_are_scored_before_penalties_and_temperature(service):
    ids = service.engine.encode("def main")
    answer = service.post(
        "/v1/completions",
        prompt=ids,
        max_tokens=12,
        logprobs=3,
        temperature=1.3,
        seed=2,
        presence_penalty=2,
        ignore_eos=True,
        return_token_ids=True,
    )
    (choice,) = answer.json()["choices"]
    generated = choice["token_ids"]
    expected_TV = log_probabilities(service, [*ids, *generated])[len(ids) - 1 :]
    expected = expected_TV.gather(1, torch.tensor(generated)[:, None])[:, 0].tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_log_probabilities_that_were_asked_for_are_never_null(n):
    with running_service(chat_template=CHAT_TEMPLATE, stops=True) as service:
        end = str(min(service.engine.end_of_text_ids))
        ended = {
            "n": n,
            "logit_bias": {end: 100},
            "max_tokens": 3,
            "presence_penalty": -2 if IS_VLLM else -100,
            "temperature": 0,
        }
        texts = service.post("/v1/completions", prompt="x", logprobs=2, **ended).json()["choices"]
        empty: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        assert [(one["text"], one["logprobs"]) for one in texts] == [("", empty)] * n
        messages = [{"role": "user", "content": "x"}]
        answer = service.post("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2, **ended)
        assert [one["logprobs"] for one in answer.json()["choices"]] == [{"content": [], "refusal": None}] * n


def test_an_answer_of_too_many_log_probabilities_is_refused_and_a_large_one_is_rendered_off_the_event_loop(
    service, monkeypatch
):
    asked = {"prompt": [[5] * 60] * 4, "max_tokens": 2, "prompt_logprobs": 20, "temperature": 0}
    monkeypatch.setattr(routes, "MAX_SCORES", 4 * 60 * 21)
    assert service.post("/v1/completions", **asked).status_code == 200
    refused = service.post("/v1/completions", **asked, logprobs=0).json()["error"]
    assert (refused["code"], refused["param"]) == ("too_many_logprobs", "prompt_logprobs")
    assert "5,048 log-probabilities: expected at most 5,040" in refused["message"]
    heavy = []
    monkeypatch.setattr(service.app.state.heavy, "run", noted(heavy, service.app.state.heavy.run))
    assert service.post("/v1/completions", **asked).status_code == 200
    assert service.post("/v1/completions", **{**asked, "prompt_logprobs": 0}).status_code == 200
    assert heavy == ["render"]


def noted(names: list[str], run: Callable[..., Any]) -> Callable[..., Any]:
    async def note(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        names.append(work.__name__)
        return await run(work, *arguments, **options)

    return note


BOUNDS: dict[str, list[object]] = {
    "temperature": [0, 1e-30, 0.7, 2.0, *([] if IS_VLLM else [5.0])],
    "top_p": [1e-9, 0.5, 0.999, 1.0],
    "top_k": [-1, 1, 40],
    "min_p": [0.0, 1.0],
    "presence_penalty": [-2.0, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2.0],
    "repetition_penalty": [0.01, 1.0, 10.0],
    "min_tokens": [0, 3],
    "ignore_eos": [False, True],
    "stop": [None, ["e"], ["zzz", " "], ["\ufffd"]],
    "include_stop_str_in_output": [False, True],
    "echo": [False, True],
}
CASES = 25


def asked_at_the_bounds(chosen: random.Random, end: int, *, is_chat: bool) -> dict[str, Any]:
    asked = {name: chosen.choice(values) for name, values in BOUNDS.items() if chosen.random() < 0.5}
    asked |= {"n": chosen.choice([1, 2, 4]), "seed": chosen.randrange(1000), "max_tokens": chosen.choice([4, 12])}
    if chosen.random() < 0.3:
        asked["logit_bias"] = {str(end): chosen.choice([-100, 5, 100]), "70": chosen.choice([-100, 100])}
    if is_chat:
        asked.pop("echo", None)
        return {**asked, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 3}
    return {**asked, "prompt": [5, 6, 7], "logprobs": 3}


def scored(choice: dict[str, Any]) -> list[tuple[str, float | None, int]]:
    """Each token of a choice: its name, its score and the number of likeliest ones beside it."""
    found = choice["logprobs"]
    if "content" in found:
        return [(one["token"], one["logprob"], len(one["top_logprobs"])) for one in found["content"]]
    tops = [len(top or {}) for top in found["top_logprobs"]]
    return list(zip(found["tokens"], found["token_logprobs"], tops, strict=True))


@pytest.mark.medium
@pytest.mark.parametrize("step", EVERY_STEP)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_shown_token_is_scored_whatever_penalties_and_sampling_are_asked_for(path, step, monkeypatch):
    use_graphs_on_cpu(monkeypatch)
    chosen = random.Random(f"{path} {step}")
    with running_service(chat_template=CHAT_TEMPLATE, stops=True, step=step) as service:
        (end,) = service.engine.end_of_text_ids
        for _ in range(CASES):
            asked = asked_at_the_bounds(chosen, end, is_chat="chat" in path)
            answer = service.post(path, **asked, return_token_ids=True)
            assert answer.status_code == 200, (asked, answer.text)
            streamed: dict[int, list[tuple[str, float | None, int]]] = {}
            for chunk in events(service.post(path, **asked, stream=True).text):
                for choice in chunk["choices"]:
                    streamed.setdefault(choice["index"], []).extend(scored(choice) if choice["logprobs"] else [])
            for choice in answer.json()["choices"]:
                assert choice["logprobs"] is not None, asked
                tokens = scored(choice)
                echoed = 3 if asked.get("echo") else 0
                assert len(tokens) == echoed + len(choice["token_ids"]), asked
                assert all(score is not None and score <= 0 and top for _, score, top in tokens[bool(echoed) :]), asked
                again = streamed[choice["index"]]
                assert [(name, count) for name, _, count in again] == [(name, count) for name, _, count in tokens]
                # Rows of other requests round differently beside them.
                whole, parts = ([score for _, score, _ in one if score is not None] for one in (tokens, again))
                assert parts == pytest.approx(whole, abs=1e-4), asked


@pytest.mark.parametrize("place", ["token", "beside it"])
def test_a_score_that_is_not_a_number_is_never_answered(service, place):
    broken = float("nan")
    score = token_logprobs(torch.tensor([[0.0, 1.0, 2.0]]), [1], 2)[0]
    if place == "token":
        score = replace(score, logprob=broken)
    else:
        score = replace(score, top_logprobs=np.array([0.5, broken], np.float32).tobytes())
    names, token = TokenNames(service.engine), PositionedToken(0, 1, score)
    for render in (lambda: prompt_logprobs([score], names), lambda: chat_logprobs([token], names),
                   lambda: completion_logprobs([token], names)):  # fmt: skip
        with pytest.raises(ValueError, match="not a number"):
            render()
