"""/score and /rerank in vLLM's form, held to the cosines of the embeddings that the service gives."""

from collections.abc import Iterator

import numpy as np
import pytest

from bento.openai.endpoints.embeddings import MAX_INPUTS
from tests.bento.openai_service import MODEL, Service, refusal, running_service
from tests.support.tiny import CONTEXT

TEXTS = ["def main():", "größer als nichts", "🦖" * 9, "return"]
SCORES, RANKS = ("/score", "/v1/score"), ("/rerank", "/v1/rerank", "/v2/rerank")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(max_body_bytes=1 << 20, max_batch_size=4, max_queue=16) as running:
        yield running


def cosines(service: Service, first: list[str], second: list[str]) -> list[float]:
    def vectors(texts):
        answer = service.post("/v1/embeddings", input=texts)
        return np.array([one["embedding"] for one in answer.json()["data"]])

    return [float(cosine) for cosine in (vectors(first) * vectors(second)).sum(axis=1)]


def scores(service: Service, path: str = "/score", **body) -> list[float]:
    answer = service.post(path, **body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [(one["index"], one["object"]) for one in data] == [(index, "score") for index in range(len(data))]
    return [one["score"] for one in data]


@pytest.mark.parametrize("path", SCORES)
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_a_score_is_the_cosine_of_two_embeddings(service, path, names):
    first, second = names
    one_to_all = scores(service, path, **{first: TEXTS[0], second: TEXTS})
    assert one_to_all == pytest.approx(cosines(service, [TEXTS[0]] * 4, TEXTS), abs=1e-5)
    assert one_to_all[0] == pytest.approx(1.0, abs=1e-6)
    pairs = scores(service, path, **{first: TEXTS, second: TEXTS[::-1]}, model=MODEL)
    assert pairs == pytest.approx(cosines(service, TEXTS, TEXTS[::-1]), abs=1e-5)
    assert len(scores(service, path, **{first: "a", second: "b"})) == 1


def test_the_answer_has_the_shape_and_counts_each_text_once(service):
    answer = service.post("/score", text_1="def main", text_2=TEXTS).json()
    tokens = sum(len(service.engine.encode(text)) for text in ["def main", *TEXTS])
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    assert answer["object"] == "list" and answer["model"] == MODEL and answer["id"].startswith("score-")


@pytest.mark.parametrize("path", RANKS)
def test_texts_are_ordered_by_their_similarity_to_the_query(service, path):
    expected = cosines(service, ["return"] * 4, TEXTS)
    answer = service.post(path, query="return", documents=TEXTS).json()
    found = [one["relevance_score"] for one in answer["results"]]
    assert found == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert answer["results"][0] == {"index": 3, "document": {"text": "return"}, "relevance_score": found[0]}
    best = service.post(path, query="return", documents=TEXTS, top_n=2, return_documents=False).json()["results"]
    assert [one["index"] for one in best] == [one["index"] for one in answer["results"][:2]]
    assert all(set(one) == {"index", "relevance_score"} for one in best)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "x"}, "text_2"),
        ({"text_2": "x"}, "text_1"),
        ({}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "documents": "b"}, "queries"),
        ({"text_1": "", "text_2": "b"}, "text_1"),
        ({"text_1": [], "text_2": "b"}, "text_1"),
        ({"text_1": "a", "text_2": ["b", 1]}, "text_2"),
        ({"text_1": "a", "text_2": ["b"] * (MAX_INPUTS + 1)}, "text_2"),
        ({"text_1": "a", "text_2": {"content": "b"}}, "text_2"),
        ({"text_1": "a", "text_2": "word " * CONTEXT}, "text_2"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"text_1": "a", "text_2": "b", "softmax": True}, "softmax"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_sides_are_refused_by_name(service, body, param):
    assert refusal(service.post("/score", **body))["param"] == param


def test_long_texts_can_be_cut(service):
    long = "word " * CONTEXT
    assert len(scores(service, text_1="a", text_2=long, truncate_prompt_tokens=-1)) == 1
    assert refusal(service.post("/rerank", query=long, documents=["a"]))["code"] == "context_length_exceeded"
    assert refusal(service.post("/rerank", query="a", documents=["a"], model="other"), 404)["param"] == "model"
