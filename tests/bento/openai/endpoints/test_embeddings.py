"""/v1/embeddings through the `openai` package, held to the model's own hidden states, for each step of the engine."""

import base64
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bento.openai.endpoints.embeddings import MAX_INPUTS
from model.generation.engine import Engine
from model.generation.requests import Embedding, GenerationRequest
from tests.bento.openai_service import MODEL, Service, refusal, running_service
from tests.support.graphs import EVERY_STEP, use_graphs_on_cpu
from tests.support.tiny import CONTEXT, tiny_model, tiny_tokenizer

TEXTS = ["def main():", "größer als nichts", "🦖" * 9, "return"]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(max_body_bytes=1 << 20, max_batch_size=4, max_queue=16) as running:
        yield running


def hidden_states(service: Service, text: str) -> np.ndarray:
    ids = torch.tensor([service.engine.encode(text)])
    with torch.inference_mode():
        return service.model.model(ids).last_hidden_state[0].float().numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_models_hidden_states(client, service, pooling):
    # The package asks for base64 and decodes it where no format is named.
    made = client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"pooling": pooling})
    assert [item.index for item in made.data] == [0, 1, 2, 3] and made.model == MODEL
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(len(service.engine.encode(t)) for t in TEXTS)
    for item, text in zip(made.data, TEXTS, strict=True):
        states_TD = hidden_states(service, text)
        expected = unit(states_TD.mean(axis=0) if pooling == "mean" else states_TD[-1])
        np.testing.assert_allclose(item.embedding, expected, atol=2e-5)


@pytest.mark.parametrize("step", EVERY_STEP)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_every_step_gives_the_same_in_chunks_and_beside_texts(step, pooling, monkeypatch):
    use_graphs_on_cpu(monkeypatch)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    prompt = [7 + i % 200 for i in range(CONTEXT)]
    with torch.inference_mode():
        states_TD = model.model(torch.tensor([prompt])).last_hidden_state[0].float().numpy()
    engine = Engine(model, tokenizer, step=step, prefill_chunk=20, max_batch_size=4, end_of_text_ids=frozenset())
    try:
        beside = engine.submit(GenerationRequest(prompt[:40], 40))
        for _ in range(2):  # the second time its keys and values are in a slot
            event, last = engine.submit(GenerationRequest(prompt, 0, embedding=pooling))
            assert isinstance(event, Embedding) and last.generated_tokens == 0
            expected = states_TD.mean(axis=0) if pooling == "mean" else states_TD[-1]
            np.testing.assert_allclose(event.vector, expected, atol=1e-4)
        *_, end = beside
        assert end.generated_tokens == 40
    finally:
        engine.stop()


def test_numbers_base64_and_dimensions_agree(client, service):
    states_TD = hidden_states(service, TEXTS[0])
    asked = {"model": MODEL, "input": TEXTS[0]}
    numbers = client.embeddings.create(**asked, encoding_format="float").data[0].embedding
    packed = service.post("/v1/embeddings", **asked, encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.array(numbers, np.float32))
    short = client.embeddings.create(**asked, dimensions=5).data[0].embedding
    np.testing.assert_allclose(short, unit(states_TD.mean(axis=0)[:5]), atol=2e-5)
    raw = client.embeddings.create(**asked, extra_body={"normalize": False}).data[0].embedding
    np.testing.assert_allclose(raw, states_TD.mean(axis=0), atol=1e-4)


def test_tokens_are_embedded_like_their_text(client, service):
    ids = [service.engine.encode(text) for text in TEXTS]
    by_text = client.embeddings.create(model=MODEL, input=TEXTS).data
    by_ids = client.embeddings.create(model=MODEL, input=ids).data
    for one, other in zip(by_text, by_ids, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)


def test_more_texts_than_the_queue_has_places_are_embedded_in_turn(client, service):
    texts = [f"text {number}" for number in range(100)]
    made = client.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in made.data] == list(range(100))
    np.testing.assert_allclose(made.data[99].embedding, unit(hidden_states(service, texts[99]).mean(axis=0)), atol=2e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [100_000]}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [5] * (CONTEXT + 1)}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 33}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"color": "red"}, "color"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_embedded_is_refused_by_name(service, body, param):
    assert refusal(service.post("/v1/embeddings", **{"input": "x", **body}))["param"] == param


def test_a_text_too_long_is_cut_where_that_is_asked_for(service):
    whole = service.post("/v1/embeddings", input=[5] * 9 + [6] * 9, truncate_prompt_tokens=9).json()
    cut = service.post("/v1/embeddings", input=[6] * 9).json()
    np.testing.assert_allclose(whole["data"][0]["embedding"], cut["data"][0]["embedding"], atol=1e-6)
    assert whole["usage"] == cut["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    long = service.post("/v1/embeddings", input=[5] * 500, truncate_prompt_tokens=-1).json()
    assert long["usage"]["prompt_tokens"] == CONTEXT
