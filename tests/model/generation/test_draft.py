"""A draft model changes how many steps a text takes, and nothing else."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.generation.requests import GenerationRequest, SamplingParameters
from model.generation.speculation import draft as draft_module
from model.generation.speculation.draft import Draft, load_draft
from model.weights import int8
from tests.model.generation.engines import GREEDY, StepHook, requests_of_all_kinds, run, start, tokens
from tests.model.generation.test_engine_lifecycle import die
from tests.support.native import needs_native
from tests.support.tiny import CONTEXT, tiny_model, tiny_tokenizer

MOST = 4
SLOTS = SimpleNamespace(slots=4)
"""In place of a step that computes nothing."""


@pytest.fixture
def always(monkeypatch) -> None:
    """The draft proposes whatever it costs: a step of a tiny model takes no longer than one of its draft."""
    monkeypatch.setattr(Draft, "_counts", lambda self, sequences, proposed, most_each, texts: most_each)


@pytest.fixture(params=["the model", "similar", "other", "smaller"])
def drafted(request, tokenizer):
    """A model and a draft of it, whose tokens are always, mostly or seldom the model's."""
    model = tiny_model(tokenizer)
    if request.param == "other":
        return model, tiny_model(tokenizer, seed=1)
    if request.param == "smaller":
        return model, tiny_model(tokenizer, hidden_size=16, num_hidden_layers=1, max_position_embeddings=CONTEXT // 2)
    draft = tiny_model(tokenizer)
    if request.param == "similar":
        generator = torch.Generator().manual_seed(0)
        for weight in draft.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model, draft


@needs_native
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_answers_are_the_same_with_a_draft_and_without(tokenizer, drafted, kind, request):
    model, draft = map(int8.quantize, drafted) if kind == "int8" else drafted
    asked = requests_of_all_kinds()
    plain = start(model, tokenizer, step="native", speculative_tokens=0)
    expected = run(plain, asked)
    plain.stop()
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST, draft=draft)
    assert run(engine, asked) == expected
    assert run(engine, asked[::-1]) == expected[::-1]  # in slots that hold other texts
    made = engine.stats()
    assert 0 < made.proposed_tokens_total > made.accepted_tokens_total
    assert made.accepted_tokens_total > 0 or request.node.callspec.params["drafted"] in ("other", "smaller")
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_a_draft_that_is_the_model_is_always_right_whatever_its_slots_held(tokenizer, monkeypatch):
    """A key or value of another text, or of a rejected token, would change a proposal."""
    monkeypatch.setattr("model.generation.sequence.proposal_length", lambda rate, texts, most: 0)
    model = tiny_model(tokenizer)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST, draft=tiny_model(tokenizer))
    asked = requests_of_all_kinds()
    run(engine, asked)
    run(engine, asked[::-1])
    canceled = [engine.submit(request) for request in asked]
    for generation in canceled[::2]:
        generation.cancel()
    for generation in canceled:
        list(generation)
    before = engine.stats()
    run(engine, [request for request in asked if not request.stop_token_ids])
    made = engine.stats()
    proposed = made.proposed_tokens_total - before.proposed_tokens_total
    accepted = made.accepted_tokens_total - before.accepted_tokens_total
    assert accepted == proposed > 100
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_a_text_whose_prompt_the_draft_has_not_computed_takes_none_of_it(tokenizer, monkeypatch):
    monkeypatch.setattr("model.generation.sequence.proposal_length", lambda rate, texts, most: 0)
    engine = start(
        tiny_model(tokenizer), tokenizer, step="native", speculative_tokens=MOST, draft=tiny_model(tokenizer)
    )
    prompt = list(range(30, 70))
    first = engine.submit(GenerationRequest(prompt, 50, GREEDY, logprobs=1))  # has no proposals
    next(iter(first))
    assert len(tokens(engine.submit(GenerationRequest([*prompt, 9], 40, GREEDY)))) == 40
    made = engine.stats()
    assert made.cached_tokens_total == len(prompt)
    assert made.accepted_tokens_total == made.proposed_tokens_total > 0
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_right_proposals_save_steps_and_a_long_prompt_is_followed_in_parts(tokenizer):
    engine = start(
        tiny_model(tokenizer), tokenizer, step="native", speculative_tokens=MOST, draft=tiny_model(tokenizer),
        max_batch_size=1, prefill_chunk=16,
    )  # fmt: skip
    lengths = []
    compute = engine._draft._step.compute

    def note(segments):
        lengths.extend(len(segment.ids) for segment in segments)
        return compute(segments)

    engine._draft._step.compute = note
    steps = []
    hook = StepHook(engine, after=steps.append)
    prompt = np.random.default_rng(0).integers(2, 90, 66).tolist()
    assert len(tokens(engine.submit(GenerationRequest(prompt, 28, GREEDY)))) == 28
    hook.remove()
    prefill = -(-66 // 16)
    assert max(lengths) <= 16 + 2 and sum(lengths) < 66 + 2 * 28
    assert len(steps) - prefill < prefill + 28 / 2
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_texts_go_on_without_a_draft_that_fails(tokenizer, caplog):
    model = tiny_model(tokenizer)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST, draft=tiny_model(tokenizer, seed=1))
    plain = start(model, tokenizer, step="native", speculative_tokens=0)
    asked = requests_of_all_kinds()
    expected = run(plain, asked)
    plain.stop()
    compute, calls = engine._draft._step.compute, []

    def fail(segments):
        calls.append(segments)
        if len(calls) > 5:
            raise RuntimeError("a draft that fails")
        return compute(segments)

    engine._draft._step.compute = fail
    assert run(engine, asked) == expected
    assert len(calls) == 6
    assert "the draft model failed: the texts go on without it" in caplog.text
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_an_engine_that_starts_again_has_an_empty_draft(tokenizer):
    model = tiny_model(tokenizer)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST, draft=tiny_model(tokenizer))
    engine.warm_up()
    request = GenerationRequest([5, 6, 7, 8], 30, GREEDY)
    expected, former = tokens(engine.submit(request)), engine._draft

    def die_once(segments):
        hook.remove()
        die()

    hook = StepHook(engine, after=die_once)
    tokens(engine.submit(request))
    while not engine.is_ready:
        time.sleep(0.01)
    before = engine.stats().proposed_tokens_total
    assert tokens(engine.submit(request)) == expected
    assert engine._draft is not former and engine.stats().proposed_tokens_total > before
    engine.stop()


@needs_native
@pytest.mark.usefixtures("always")
def test_the_memory_of_the_drafts_keys_and_values_counts_and_has_the_same_limit(tokenizer):
    model, draft = tiny_model(tokenizer), tiny_model(tokenizer)
    plain = start(model, tokenizer, step="native", speculative_tokens=0)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST, draft=draft)
    for made in (plain, engine):
        tokens(made.submit(GenerationRequest([5, 6, 7], 90, GREEDY)))
    assert engine.stats().cache_bytes == 2 * plain.stats().cache_bytes
    options = {"step": "native", "kv_cache_mib": 1, "max_batch_size": 64}
    limited = [start(model, tokenizer, **options), start(model, tokenizer, **options, draft=draft)]
    alone, both = (made.stats().cache_capacity_tokens for made in limited)
    assert alone == 2 * both
    for made in (plain, engine, *limited):
        made.stop()


@needs_native
@pytest.mark.parametrize(
    "options",
    [{"step": "reference"}, {"kv_cache": False}, {"speculative_tokens": 0}],
    ids=lambda value: next(iter(value)),
)
def test_a_draft_that_cannot_be_used_is_one_line(tokenizer, caplog, options):
    engine = start(tiny_model(tokenizer), tokenizer, draft=tiny_model(tokenizer), **{"step": "native", **options})
    assert caplog.text.count("the draft model is not used: ") == 1
    assert len(tokens(engine.submit(GenerationRequest([5, 6, 7], 20, GREEDY)))) == 20
    assert engine.stats().proposed_tokens_total == 0
    engine.stop()


def test_a_draft_with_another_vocabulary_is_refused(tokenizer):
    with pytest.raises(PipelineError, match=r"the draft model has a vocabulary of 400 tokens: expected the model's, "):
        start(tiny_model(tokenizer), tokenizer, draft=tiny_model(tokenizer, vocab_size=400))


def test_a_directory_is_loaded_in_the_models_precision_and_needs_the_models_tokenizer(tokenizer, tmp_path):
    tiny_model(tokenizer, seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model(tokenizer)
    assert not int8.is_quantized(load_draft(tmp_path, model, tokenizer))
    assert load_draft(tmp_path, tiny_model(tokenizer).bfloat16(), tokenizer).dtype == torch.bfloat16
    assert int8.is_quantized(load_draft(tmp_path, int8.quantize(tiny_model(tokenizer)), tokenizer))
    path = tmp_path / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    first, second = [name for name, number in vocabulary.items() if number in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(found))
    with pytest.raises(
        PipelineError, match=r"^the draft model .* has another tokenizer \(\d+ tokens, 4 entries differ"
    ):
        load_draft(tmp_path, model, tiny_tokenizer())


def counts(draft_ms: float, texts: list[tuple[float, float, int]], others: int = 0, most: int = 8) -> list[int]:
    """Tokens proposed by a draft whose steps take `draft_ms`, where the model's take 2 ms and 0.1 ms a token.

    texts: how often the draft is right in each, how often the text's own proposal, and its length.
    """
    made = Draft(SLOTS, [draft_ms] * 65, [2.0 + rows * 0.1 for rows in range(65)])
    sequences = []
    for slot, (rate, own, _) in enumerate(texts):
        made._texts[slot].rate, made._texts[slot].place = rate, 9
        sequences.append(SimpleNamespace(slot=slot, repetition_rate=own, num_tokens=10))
    return made._counts(sequences, [length for *_, length in texts], [most] * len(texts), len(texts) + others)


def test_more_is_proposed_the_surer_and_the_cheaper_it_is_and_none_where_it_does_not_pay():
    rates = [0.0, 0.3, 0.5, 0.7, 0.9, 0.99]
    many, few = ([counts(cost, [(rate, 0.0, 0)])[0] for rate in rates] for cost in (0.1, 1.0))
    assert many == sorted(many) and many[0] == 0 and many[-1] == 8
    assert all(one <= other for one, other in zip(few, many, strict=True))
    assert few[2] == 0 < many[2]
    assert counts(2.2, [(0.99, 0.0, 0)]) == [0]  # as slow as the model
    assert counts(0.1, [(0.9, 0.0, 0)], most=1) == [1] and counts(0.1, [(0.9, 0.0, 0)], most=0) == [0]
    assert counts(0.1, []) == []


def test_a_draft_that_is_right_as_often_as_the_text_itself_is_not_asked():
    assert counts(0.1, [(0.9, 0.9, 4)]) == [0]
    assert counts(0.1, [(0.9, 0.3, 4)])[0] > 0
    better, other = counts(0.02, [(0.9, 0.95, 8), (0.9, 0.0, 0)])
    assert better == 0 < other


def test_a_pass_that_pays_for_several_texts_need_not_pay_for_one_of_them():
    assert counts(0.5, [(0.8, 0.0, 0)] * 4) != [0] * 4
    assert counts(0.5, [(0.8, 0.0, 0)] + [(0.1, 0.0, 0)] * 3) == [0] * 4
    assert counts(0.5, [(0.8, 0.0, 0)], others=3) == [0]


@needs_native
def test_a_draft_that_is_mostly_wrong_proposes_seldom(tokenizer, monkeypatch):
    costs = [[0.1] * 65, [2.0 + rows * 0.1 for rows in range(65)]]
    monkeypatch.setattr(draft_module, "measured_seconds", lambda steps: costs)
    asked = GenerationRequest([5, 6, 7], CONTEXT - 3, SamplingParameters(temperature=1.0, seed=4))
    proposed = {}
    for seed in (0, 1):
        engine = start(
            tiny_model(tokenizer),
            tokenizer,
            step="native",
            speculative_tokens=MOST,
            draft=tiny_model(tokenizer, seed=seed),
        )
        tokens(engine.submit(asked))
        proposed[seed] = engine.stats().proposed_tokens_total
        engine.stop()
    assert proposed[0] > (CONTEXT - 3) * 0.6
    assert 0 < proposed[1] < (CONTEXT - 3) * 0.25
