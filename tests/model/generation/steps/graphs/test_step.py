"""The graphs step as it runs on a CPU: passes, penalties, masks and what fails.

Tests of the engine, of grammars and of scores run over it, too (`each_step`); `test_kernels.py` has the kernels,
`test_ahead.py` what is computed in advance.
"""

from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.generation.constraints import Constraint
from model.generation.grammar.grammar import GrammarFailure
from model.generation.requests import Finished, GenerationRequest, SamplingParameters
from model.generation.sampler import Sampler
from model.generation.steps.choose import choose_step
from model.generation.steps.draw import Adjustment
from model.generation.steps.graphs import adjustments
from model.generation.steps.graphs.passes import MAX_ROWS
from model.generation.steps.graphs.step import GraphStep
from model.generation.steps.step import Segment
from model.weights import int4, int8
from tests.model.generation.engines import GREEDY, last, reference, start, tokens
from tests.support.graphs import TEXTS, GraphStepOnCPU, alone, use_graphs_on_cpu
from tests.support.tiny import SHAPES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_segments_in_any_company_equal_the_whole_text_alone(shape, kind):
    if kind == "int4":
        shape = {"hidden_size": 64, "intermediate_size": 128, **shape}
    model = tiny_model(tiny_tokenizer(), **shape)
    if kind != "float32":
        (int8 if kind == "int8" else int4).quantize(model)
    step, done = GraphStepOnCPU.create(model, 4), [0, 0, 0, 0]
    assert step.precision == kind
    expected = [alone(model, ids) for ids in TEXTS]
    chunks = [{2: 7}, {0: 20, 3: 5}, {2: 1, 3: 1}, {3: 1, 0: 1, 1: 9}, {0: 1, 1: 1, 2: 1, 3: 1}, {1: 1, 3: 1, 2: 12}]
    for number, sizes in enumerate(chunks):
        wanted = "all" if number % 2 else "last"
        segments = [
            Segment(slot, done[slot], TEXTS[slot][done[slot] : done[slot] + n], wanted) for slot, n in sizes.items()
        ]
        for segment, output in zip(segments, step.compute(segments), strict=True):
            end = segment.start + len(segment.ids)
            rows = expected[segment.slot][segment.start if wanted == "all" else end - 1 : end]
            torch.testing.assert_close(output.logits_RV, rows, atol=2e-4, rtol=1e-4)
            assert output.tokens == (int(output.logits_RV[-1].argmax()),)
            done[segment.slot] = end


def test_a_prompt_of_several_passes_and_pages_is_that_of_one(passes):
    model = tiny_model(tiny_tokenizer(), max_position_embeddings=1024)
    step = GraphStepOnCPU(model, 2)
    ids = np.arange(MAX_ROWS + 100) * 7 % 270 + 2
    (output,) = step.compute([Segment(1, 0, ids)])
    assert passes == [MAX_ROWS, 100]
    torch.testing.assert_close(output.logits_RV[0], alone(model, ids)[-1], atol=5e-4, rtol=1e-4)
    (whole,) = step.compute([Segment(0, 0, ids, "all")])
    torch.testing.assert_close(whole.logits_RV, alone(model, ids), atol=5e-4, rtol=1e-4)
    (hidden,) = step.compute([Segment(0, 0, ids, "hidden")])
    assert hidden.hidden_RD.shape == (len(ids), model.config.hidden_size)
    with torch.inference_mode():
        states = model.model(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden.hidden_RD, states, atol=5e-4, rtol=1e-4)


ADJUSTED = [
    SamplingParameters(temperature=0, logit_bias={7: -20.0, 200: 0.5}),
    SamplingParameters(temperature=0, repetition_penalty=1.5),
    SamplingParameters(temperature=0, frequency_penalty=0.5),
    SamplingParameters(temperature=0.7, top_p=0.9, presence_penalty=-0.5, seed=3),
    SamplingParameters(temperature=1, repetition_penalty=0.8, frequency_penalty=1, logit_bias={7: 3.0}, seed=4),
    GREEDY,
]


def test_penalties_and_biases_are_applied_by_the_step_one_step_ahead(passes, monkeypatch):
    model = tiny_model(tiny_tokenizer())
    use_graphs_on_cpu(monkeypatch)
    # A prompt with repeated tokens; the same one for all, so that only the parameters make the texts different.
    asked = [GenerationRequest([40, 90, 18, 40], 20, sampling) for sampling in ADJUSTED]
    engine = start(model, tiny_tokenizer(), step="reference")
    expected = [tokens(engine.submit(request)) for request in asked]
    engine.stop()
    assert len({*map(tuple, expected)}) == len(asked)
    assert expected[-1] == reference(model, [40, 90, 18, 40], 20)
    engine = start(model, tiny_tokenizer(), step="graphs", max_batch_size=len(asked))

    def fail(*_):
        raise AssertionError("a token was chosen on the host")

    monkeypatch.setattr(Sampler, "next", fail)
    for request, text in zip(asked, expected, strict=True):
        passes.clear()
        assert tokens(engine.submit(request)) == text
        assert passes[1:] == [1] * 19  # each step was launched once, before it was asked for
    together = [engine.submit(request) for request in asked]
    assert [tokens(generation) for generation in together] == expected
    engine.stop()


def test_more_biases_than_the_device_holds_are_added_on_the_host(monkeypatch):
    monkeypatch.setattr(adjustments, "MOST_BIASES", 3)
    model = tiny_model(tiny_tokenizer())
    use_graphs_on_cpu(monkeypatch)
    engine = start(model, tiny_tokenizer(), step="graphs")
    on_host = []
    choose_next = Sampler.next
    monkeypatch.setattr(Sampler, "next", lambda *given: on_host.append(1) or choose_next(*given))
    for count in (3, 4):
        sampling = SamplingParameters(
            temperature=0, logit_bias={100 + number: 25.0 * (1 + number) for number in range(count)}
        )
        assert tokens(engine.submit(GenerationRequest([40, 90, 18], 5, sampling))) == [100 + count - 1] * 5
        assert len(on_host) == (0 if count == 3 else 5)
    engine.stop()
    step = GraphStepOnCPU(model, 1)
    assert not step.adjust(0, Adjustment([1], 1.0, 0.0, 0.0, {step.vocab_size: 1.0}))


CONSTRAINED = [
    GenerationRequest([40, 90, 18], 12, GREEDY, allowed_token_ids=frozenset(range(30, 60))),
    GenerationRequest([40, 90, 18], 12, SamplingParameters(temperature=0.9, seed=1), bad_words=("e", "a")),
    GenerationRequest([40, 90, 18], 12, ADJUSTED[4], allowed_token_ids=frozenset({5, 7, 100, 271})),
    # Its first tokens are chosen with a mask, the others without, by all that came before.
    GenerationRequest([40, 90, 18], 12, ADJUSTED[1], min_tokens=5, stop_token_ids=(7, 40)),
    GenerationRequest([40, 90, 18], 12, GREEDY),
]


def test_masks_of_allowed_tokens_are_applied_by_the_step(monkeypatch):
    model, tokenizer = tiny_model(tiny_tokenizer()), tiny_tokenizer()
    use_graphs_on_cpu(monkeypatch)
    engine = start(model, tokenizer, step="reference")
    expected = [tokens(engine.submit(request)) for request in CONSTRAINED]
    engine.stop()
    unconstrained = [replace(r, allowed_token_ids=None, bad_words=(), min_tokens=0) for r in CONSTRAINED[:-1]]
    engine = start(model, tokenizer, step="graphs", max_batch_size=5)
    assert all(tokens(engine.submit(r)) != text for r, text in zip(unconstrained, expected[:-1], strict=True))

    def fail(*_):
        raise AssertionError("a token was chosen on the host")

    monkeypatch.setattr(Sampler, "next", fail)
    assert [tokens(engine.submit(request)) for request in CONSTRAINED] == expected
    together = [engine.submit(request) for request in CONSTRAINED]
    assert [tokens(generation) for generation in together] == expected
    engine.stop()


@pytest.mark.parametrize("more", [{"logprobs": 2}, {"allowed_token_ids": frozenset(range(30, 60))}], ids=str)
def test_a_text_that_cannot_run_ahead_takes_no_pass_of_its_own(monkeypatch, passes, more):
    """A pass reads all weights: two in each step would halve the speed of the texts beside it."""
    use_graphs_on_cpu(monkeypatch)
    engine = start(tiny_model(tiny_tokenizer()), tiny_tokenizer(), step="graphs", max_batch_size=4)
    asked = [GenerationRequest([40, 90, 18 + number], 50, GREEDY) for number in range(4)]
    asked[2] = replace(asked[2], **more)
    passes.clear()
    ended = SimpleQueue()
    engine.submit_all(asked, lambda number, event: isinstance(event, Finished) and ended.put(event))
    assert [ended.get(timeout=60).generated_tokens for _ in asked] == [50] * 4
    assert len(passes) < 60
    engine.stop()


@pytest.mark.parametrize("error", [GrammarFailure("the form has no next token"), RuntimeError("broken")], ids=str)
def test_a_constraint_that_fails_ends_its_own_request(monkeypatch, error):
    model = tiny_model(tiny_tokenizer())
    use_graphs_on_cpu(monkeypatch)
    engine = start(model, tiny_tokenizer(), step="graphs")
    right, calls = Constraint.next_allowed, []

    def fail_later(constraint: Constraint, *given):
        calls.append(1)
        if len(calls) > 6:
            raise error
        return right(constraint, *given)

    monkeypatch.setattr(Constraint, "next_allowed", fail_later)
    well, failing = (engine.submit(request) for request in (CONSTRAINED[-1], CONSTRAINED[0]))
    assert tokens(well) == reference(model, [40, 90, 18], 12)
    assert last(failing).error and engine.stats().restarts_total == 0
    engine.stop()


def test_broken_logits_are_told_and_do_not_reach_the_next_text():
    model = tiny_model(tiny_tokenizer())
    step = GraphStepOnCPU(model, 2)
    cache = step._cache
    step.compute([Segment(0, 0, TEXTS[0][:9], "none"), Segment(1, 0, TEXTS[1][:9], "none")])
    with torch.inference_mode():
        cache.data[:, :, int(cache._pages[0, 0])] = torch.nan
    broken, well = step.compute([Segment(slot, 9, TEXTS[slot][9:10], "token", following=(None,)) for slot in range(2)])
    assert broken.tokens == (None,) and well.tokens == (int(alone(model, TEXTS[1][:10])[-1].argmax()),)
    step.clear(0)
    (found,) = step.compute([Segment(0, 0, TEXTS[2][:9])])
    torch.testing.assert_close(found.logits_RV[0], alone(model, TEXTS[2][:9])[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch stands for the kernels in the other tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_int8", [False, True])
def test_on_a_gpu_the_engine_takes_the_step_and_generates_what_the_reference_does(dtype, is_int8):
    model = tiny_model(tiny_tokenizer())
    if is_int8:
        int8.quantize(model)
    model = model.to("cuda", dtype)
    prompts = [[40, 90, 17 + number] for number in range(4)]
    texts = []
    for name in ("auto", "reference"):
        engine = start(model, tiny_tokenizer(), step=name)
        assert engine.step_name == ("graphs" if name == "auto" else "reference")
        asked = [engine.submit(GenerationRequest(prompt, 30, GREEDY)) for prompt in prompts]
        texts.append([tokens(generation) for generation in asked])
        engine.stop()
    if dtype == torch.float32:
        assert texts[0] == texts[1]
    assert all(len(text) == 30 for text in texts[0])


def test_without_a_gpu_the_step_says_so():
    model = tiny_model(tiny_tokenizer())
    assert GraphStep.unavailable(model) == "the model is on cpu, not on a GPU"
    with pytest.raises(PipelineError, match="step is 'graphs': the model is on cpu, not on a GPU; set it to 'auto'"):
        choose_step(model, "graphs")
