"""Beam search finds the texts of `generate(num_beams=...)`, in any company, and leaves its places behind."""

from dataclasses import replace

import pytest
import torch

from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.requests import Beams, EngineBusy, Finished, GenerationRequest, PromptScores, TextPiece
from tests.model.generation.engines import GREEDY, PROMPT, reference, start, tokens
from tests.support.tiny import tiny_model

ENDS = frozenset(range(6, 280, 17))
"""Tokens that end a text: enough that some beams of a model with random weights end early."""


def texts_of(request: GenerationRequest, width: int) -> list[GenerationRequest]:
    beams = request.beams or Beams(width)
    return [replace(request, beams=replace(beams, width=width, rank=rank)) for rank in range(width)]


def search(engine: Engine, request: GenerationRequest, width: int) -> list[list]:
    """The events of each text."""
    events: list[list] = [[] for _ in range(width)]
    made = engine.submit_all(texts_of(request, width), lambda index, event: events[index].append(event))
    waiter = engine.submit(GenerationRequest(PROMPT, 1, GREEDY))
    while not all(one.is_finished for one in made):
        tokens(waiter)
        waiter = engine.submit(GenerationRequest(PROMPT, 1, GREEDY))
    tokens(waiter)
    return events


def found(events: list[list], ends=frozenset()) -> list[list[int]]:
    """The tokens of each text, with the one that ended it if the engine's `stopped_by` has it."""
    texts = []
    for text in events:
        ids = [token for event in text if isinstance(event, TextPiece) for token in event.token_ids]
        texts.append(ids + ([text[-1].stopped_by] if text[-1].finish_reason == "stop" else []))
    return texts


def expected(model, prompt: list[int], width: int, count: int, ends=(), **options) -> list[list[int]]:
    made = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        attention_mask=torch.ones(1, len(prompt)),
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
        **options,
    )
    texts = []
    for row in made[:, len(prompt) :].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in ends), count)
        texts.append(row[:end])
    return texts


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.usefixtures("each_step")
def test_the_texts_are_those_of_generate(model, engine, width):
    assert found(search(engine, GenerationRequest(PROMPT, 20), width)) == expected(model, PROMPT, width, 20)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0, 2.5])
def test_texts_that_end_are_ranked_as_generate_ranks_them(tokenizer, model, length_penalty, early_stopping):
    engine = start(model, tokenizer, step="reference")
    rules = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    lengths: set[int] = set()
    for prompt in (PROMPT, [101]):
        ends = {text[at] for text in expected(model, prompt, 4, 16) for at in (4, 9)}
        request = GenerationRequest(prompt, 16, stop_token_ids=frozenset(ends), beams=Beams(4, **rules))
        made = found(search(engine, request, 4))
        assert made == expected(model, prompt, 4, 16, ends, **rules)
        lengths |= {len(text) for text in made}
    assert length_penalty > 0 or min(lengths) < 16
    engine.stop()


def test_no_text_ends_before_its_fewest_tokens(tokenizer, model):
    engine = start(model, tokenizer, step="reference")
    request = GenerationRequest(PROMPT, 16, min_tokens=9, stop_token_ids=ENDS)
    made = found(search(engine, request, 3))
    assert made == expected(model, PROMPT, 3, 16, ENDS, min_new_tokens=9) and min(map(len, made)) > 9
    engine.stop()


@pytest.mark.parametrize("options", [{"max_batch_size": 1}, {"kv_cache": False}, {"prefill_chunk": 3}], ids=str)
def test_a_search_needs_no_slot_for_each_beam(tokenizer, model, options):
    engine = start(model, tokenizer, **options)
    assert found(search(engine, GenerationRequest(PROMPT, 12), 4)) == expected(model, PROMPT, 4, 12)
    engine.stop()


def test_searches_and_other_requests_change_nothing_for_each_other(model, engine):
    events: list[list] = [[] for _ in range(6)]
    both = [*texts_of(GenerationRequest(PROMPT, 15), 3), *texts_of(GenerationRequest([9, 8, 7], 15), 3)]
    beside = [engine.submit(GenerationRequest([5, 6], 40, GREEDY)) for _ in range(3)]
    made = engine.submit_all(both, lambda index, event: events[index].append(event))
    assert [tokens(one) for one in beside] == [reference(model, [5, 6], 40)] * 3
    while not all(one.is_finished for one in made):
        tokens(engine.submit(GenerationRequest(PROMPT, 1, GREEDY)))
    assert found(events[:3]) == expected(model, PROMPT, 3, 15)
    assert found(events[3:]) == expected(model, [9, 8, 7], 3, 15)
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_text_has_its_tokens_scores_and_the_prompts(model, engine):
    request = GenerationRequest(PROMPT, 6, logprobs=2, prompt_logprobs=0)
    for text in search(engine, request, 3):
        scores, *pieces, last = text
        assert isinstance(scores, PromptScores) and len(scores.logprobs) == len(PROMPT)
        assert isinstance(last, Finished)
        assert (last.finish_reason, last.prompt_tokens, last.generated_tokens) == ("length", len(PROMPT), 6)
        chosen = [piece.token_ids[0] for piece in pieces if piece.token_ids]
        logits = model(torch.tensor([[*PROMPT, *chosen]])).logits[0, len(PROMPT) - 1 : -1]
        own = [piece.logprobs[0] for piece in pieces if piece.token_ids]
        assert [one.logprob for one in own] == pytest.approx(
            logits.log_softmax(-1)[range(6), chosen].tolist(), abs=1e-4
        )
        assert all(len(one.top) == 2 for one in own)


def test_a_search_counts_as_many_places_as_it_has_beams_until_it_ends(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=2, max_queue=6)
    held = gate(engine)
    events: list[list] = [[] for _ in range(5)]
    made = engine.submit_all(
        texts_of(GenerationRequest(PROMPT, 8), 5), lambda index, event: events[index].append(event)
    )
    assert held.reached.wait(30)
    with pytest.raises(EngineBusy):
        engine.submit_all(texts_of(GenerationRequest(PROMPT, 8), 5), lambda index, event: None)
    held.open()
    while not all(one.is_finished for one in made):
        tokens(engine.submit(GenerationRequest(PROMPT, 1, GREEDY)))
    assert found(events) == expected(model, PROMPT, 5, 8)
    assert found(search(engine, GenerationRequest(PROMPT, 8), 5)) == found(events)
    with pytest.raises(PipelineError, match="9 texts at once"):
        engine.submit_all(texts_of(GenerationRequest(PROMPT, 8), 9), lambda index, event: None)
    engine.stop()


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_search_ends_where_its_client_leaves_or_the_engine_stops(model, tokenizer, gate, how):
    engine = start(model, tokenizer)
    held = gate(engine)
    events: list[list] = [[] for _ in range(3)]
    made = engine.submit_all(
        texts_of(GenerationRequest(PROMPT, 60), 3), lambda index, event: events[index].append(event)
    )
    assert held.reached.wait(30)
    for one in made if how == "cancel" else ():
        one.cancel()
    if how == "stop":
        engine._stopping = True
    held.open()
    if how == "cancel":
        tokens(engine.submit(GenerationRequest(PROMPT, 3, GREEDY)))
    engine.stop()
    assert [[event.finish_reason for event in text] for text in events] == [["cancelled"]] * 3


def test_a_step_that_fails_fails_the_search_and_no_other_request(model, engine, monkeypatch):
    events: list[list] = [[] for _ in range(2)]
    asked = GenerationRequest(PROMPT, 30)
    monkeypatch.setattr("model.generation.beams.BeamSearch.advance", lambda search, found: 1 / 0)
    made = engine.submit_all(texts_of(asked, 2), lambda index, event: events[index].append(event))
    assert tokens(engine.submit(GenerationRequest(PROMPT, 9, GREEDY))) == reference(model, PROMPT, 9)
    assert all(one.is_finished for one in made)
    assert [[event.finish_reason for event in text] for text in events] == [["error"]] * 2


def test_texts_of_an_incomplete_search_and_a_search_wider_than_the_vocabulary_are_refused(model, tokenizer, engine):
    beams = texts_of(GenerationRequest(PROMPT, 3), 3)
    for some in (beams[:2], beams[1:], [GenerationRequest(PROMPT, 3, GREEDY), beams[1]], [beams[0], beams[0]]):
        with pytest.raises(PipelineError, match="a beam search of width 3"):
            engine.submit_all(some, lambda index, event: None)
    with pytest.raises(PipelineError, match="the vocabulary has fewer tokens"):
        engine.submit_all(texts_of(GenerationRequest(PROMPT, 3), 281), lambda index, event: None)
    with pytest.raises(PipelineError, match="length_penalty is 99"):
        Beams(2, length_penalty=99)


def test_end_of_text_tokens_end_a_text_unless_they_are_ignored(tokenizer):
    stopping = tiny_model(tokenizer, stops=True)
    engine = Engine(stopping, tokenizer, step="reference", end_of_text_ids=ENDS)
    ended = search(engine, GenerationRequest(PROMPT, 30), 4)
    stopped = [text for text in ended if text[-1].finish_reason == "stop"]
    assert stopped and all(text[-1].stopped_by is None for text in stopped)
    ids = [[token for e in text[:-1] if isinstance(e, TextPiece) for token in e.token_ids] for text in ended]
    cut = [text[:-1] if text[-1] in ENDS else text for text in expected(stopping, PROMPT, 4, 30, ENDS)]
    assert ids == cut
    assert [text[-1].generated_tokens for text in ended] == [
        len(text) for text in expected(stopping, PROMPT, 4, 30, ENDS)
    ]
    free = search(engine, GenerationRequest(PROMPT, 30, ignore_eos=True), 4)
    assert found(free) == expected(stopping, PROMPT, 4, 30)
    engine.stop()
