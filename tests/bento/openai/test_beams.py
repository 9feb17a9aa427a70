"""Beam search over the OpenAI routes: the texts of `generate(num_beams=...)`, best first, or a refusal by name."""

from collections.abc import Iterator

import pytest
import torch

from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, Service, refusal, running_service

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATHS = [COMPLETIONS, CHAT]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, step="reference") as running:
        yield running


def ask(service: Service, path: str, **body) -> dict:
    answer = service.post(path, **{**GOOD[path], "max_tokens": 12, "return_token_ids": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(service: Service, prompt: list[int], width: int, texts: int, count: int = 12, **options) -> list[list]:
    made = service.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=count,
        do_sample=False,
        num_beams=width,
        num_return_sequences=texts,
        pad_token_id=0,
        **options,
    )
    return made[:, len(prompt) :].tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n", "best_of"), [(1, None), (3, None), (1, 4), (2, 5)])
def test_the_n_best_of_a_search_with_best_of_beams_are_those_of_generate(service, path, n, best_of):
    answer = ask(service, path, n=n, best_of=best_of, use_beam_search=True)
    prompt = answer["choices"][0]["prompt_token_ids"]
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert ids == expected(service, prompt, best_of or n, n)
    texts = [choice["text"] if path == COMPLETIONS else choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [service.engine.decode(one) for one in ids]
    assert answer["usage"]["completion_tokens"] == 12 * (best_of or n)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


def test_each_prompt_has_a_search_of_its_own_and_a_text_its_log_probabilities(service):
    body = {"prompt": [[5, 6, 7], [9]], "n": 2, "use_beam_search": True, "logprobs": 3, "echo": True}
    answer = ask(service, COMPLETIONS, **body, length_penalty=0.5, early_stopping="never")
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert ids == [*expected(service, [5, 6, 7], 2, 2), *expected(service, [9], 2, 2)]
    for choice, own in zip(answer["choices"], ([5, 6, 7], [5, 6, 7], [9], [9]), strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        logits = service.model(torch.tensor([own + choice["token_ids"]])).logits[0]
        ours = logits[:-1].log_softmax(-1)[range(len(scores) - 1), [*own, *choice["token_ids"]][1:]]
        assert scores[0] is None and scores[1:] == pytest.approx(ours.tolist(), abs=1e-4)
        assert all(len(top) in (3, 4) for top in choice["logprobs"]["top_logprobs"][1:])


@pytest.mark.parametrize("path", PATHS)
def test_neutral_values_do_not_change_a_search(service, path):
    plain = ask(service, path, n=2, use_beam_search=True)["choices"]
    for body in (
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "seed": 5},
        {"temperature": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0, "stop": [], "logit_bias": {}},
        {"length_penalty": 1, "early_stopping": False, "best_of": 2, "stream": False, "tools": []},
    ):
        assert ask(service, path, n=2, use_beam_search=True, **body)["choices"] == plain
    without = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "seed": 1}
    assert ask(service, path, **without)["choices"] == ask(service, path, seed=1)["choices"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.9}, "top_p"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stop": "x"}, "stop"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"stream": True}, "stream"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 65}, "n"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping"),
    ],
    ids=str,
)
def test_parameters_that_a_search_does_not_support_are_refused_by_name(service, path, body, param):
    assert refusal(service.post(path, **{**GOOD[path], "use_beam_search": True, **body}))["param"] == param


def test_a_search_that_may_call_functions_is_refused(service):
    body = {**GOOD[CHAT], "use_beam_search": True, "tools": [FUNCTION]}
    assert refusal(service.post(CHAT, **body))["param"] == "tools"
    assert service.post(CHAT, **body, tool_choice="none").status_code == 200


def test_a_chat_returns_the_likeliest_of_several_texts(service):
    sampling = {"temperature": 1.0, "seed": 3}
    drawn = ask(service, CHAT, n=4, logprobs=True, **sampling)["choices"]
    means = [sum(one["logprob"] for one in choice["logprobs"]["content"]) / 12 for choice in drawn]
    (best,) = ask(service, CHAT, best_of=4, **sampling)["choices"]
    assert best["token_ids"] == drawn[means.index(max(means))]["token_ids"]
