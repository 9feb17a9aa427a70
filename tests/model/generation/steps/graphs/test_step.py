"""The graphs step as it runs on a CPU: passes, the step ahead, pages and the comparison with the reference.

Tests of the engine, of grammars and of scores run over it, too (`each_step`); `test_kernels.py` has the kernels.
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
from model.generation.steps.draw import Adjustment, Draw, draw_token
from model.generation.steps.graphs import adjustments, plain
from model.generation.steps.graphs.pages import PAGE
from model.generation.steps.graphs.passes import MAX_ROWS, Passes
from model.generation.steps.graphs.step import GraphStep
from model.generation.steps.step import Segment
from model.weights import int4, int8
from tests.model.generation.engines import GREEDY, last, reference, start, tokens
from tests.support.graphs import GraphStepOnCPU, use_graphs_on_cpu
from tests.support.tiny import SHAPES, tiny_model, tiny_tokenizer

TEXTS = [np.arange(start, start + 60) % 270 + 2 for start in (3, 70, 140, 210)]


def alone(model, ids: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float()


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of each pass that is launched."""
    launched: list[int] = []
    launch = Passes.launch
    monkeypatch.setattr(
        Passes, "launch", lambda self, rows, *more: launched.append(len(rows)) or launch(self, rows, *more)
    )
    return launched


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


def decode(step: GraphStep, texts: list[list[int]], count: int, draws: list[list[Draw]] | None, ahead: bool) -> None:
    """Append `count` tokens to each text, as the scheduler does. draws: of each text and token."""
    step.compute([Segment(slot, 0, np.array(ids[:-1]), "none") for slot, ids in enumerate(texts)])
    for number in range(count):
        segments = []
        for slot, ids in enumerate(texts):
            chosen = [() if draws is None else (draws[slot][number + i],) for i in range(2)]
            following = chosen[1] if ahead and number < count - 1 else None
            segments.append(Segment(slot, len(ids) - 1, np.array(ids[-1:]), "token", chosen[0], following=following))
        for ids, output in zip(texts, step.compute(segments), strict=True):
            ids.append(output.tokens[0])


@pytest.mark.parametrize("sampled", [False, True])
def test_the_step_ahead_has_the_tokens_of_one_after_the_other(sampled, passes):
    model = tiny_model(tiny_tokenizer())
    generator = np.random.default_rng(0)
    draws = [[Draw(0.9, 0, 0.95, 0.0, u) for u in generator.random(31)] for _ in range(3)] if sampled else None
    plain_texts, ahead_texts = ([TEXTS[slot][:9].tolist() for slot in range(3)] for _ in range(2))
    decode(GraphStepOnCPU(model, 4), plain_texts, 30, draws, ahead=False)
    assert passes == [24] + [3] * 30
    decode(GraphStepOnCPU(model, 4), ahead_texts, 30, draws, ahead=True)
    assert ahead_texts == plain_texts
    assert passes[31:] == [24] + [3] * 30  # each step was launched once, before it was asked for


def test_a_text_that_ends_or_joins_leaves_the_others_as_they_are(passes):
    model = tiny_model(tiny_tokenizer())
    step, one = GraphStepOnCPU(model, 4), GraphStepOnCPU(model, 1)
    texts = [TEXTS[slot][:9].tolist() for slot in range(4)]
    expected = []
    for ids in texts:
        ids = list(ids)
        decode(one, [ids], 12, None, ahead=False)
        expected.append(ids)
    step.compute([Segment(slot, 0, np.array(texts[slot][:-1]), "none") for slot in range(3)])
    passes.clear()
    running = [0, 1, 2]
    for number in range(12):
        if number == 4:
            running.remove(1)  # its row of the step ahead is left
            step.truncate(1, 0)
        if number == 8:
            step.compute([Segment(3, 0, np.array(texts[3][:-1]), "none")])
            running.append(3)
        segments = [Segment(s, len(texts[s]) - 1, np.array(texts[s][-1:]), "token", following=()) for s in running]
        for slot, output in zip(running, step.compute(segments), strict=True):
            texts[slot].append(output.tokens[0])
    # Two rows after the end of one; the prompt, its first token beside what is computed already, and all three.
    assert passes == [3, *[3] * 4, *[2] * 4, 8, 1, *[3] * 4]
    for ids, whole in zip(texts, expected, strict=True):
        assert ids == whole[: len(ids)]


def test_a_prompt_and_a_mask_leave_the_others_what_was_computed_ahead(passes):
    model = tiny_model(tiny_tokenizer())
    step = GraphStepOnCPU(model, 4)
    allowed_V = np.ones(step.vocab_size, np.bool_)

    def token(slot: int, start: int, ids: np.ndarray, following: tuple | None = (), **more: object) -> Segment:
        return Segment(slot, start, ids, "token", following=following, **more)

    texts = {slot: TEXTS[slot][:20].tolist() for slot in range(3)}
    prompt = list(texts)[:2]

    def run(*segments: Segment) -> None:
        passes.clear()
        for segment, output in zip(segments, step.compute(segments), strict=True):
            texts[segment.slot] += [*output.tokens]

    def following(slot: int, **more: object) -> Segment:
        return token(slot, len(texts[slot]) - 1, np.array(texts[slot][-1:]), **more)

    run(*[token(slot, 0, TEXTS[slot][:20]) for slot in prompt])
    assert passes == [40, 2]  # the second tokens of both are on their way
    run(following(0), following(1), token(2, 0, TEXTS[2][:20]))
    assert passes == [20]  # a second step with a prompt: nothing is ahead
    run(*map(following, texts))
    assert passes == [3, 3]
    run(*map(following, texts))
    assert passes == [3]
    run(following(0), following(1), following(2, allowed_V=allowed_V))
    assert passes == [1, 3]
    run(following(0), following(2))
    assert passes == [2]
    run(*map(following, texts))  # the text that was left out has kept its token
    assert passes == [3]
    for slot, ids in texts.items():
        assert ids[20:] == alone(model, np.array(ids[:-1]))[19:].argmax(dim=1).tolist(), slot


def test_steps_of_any_texts_give_each_the_tokens_that_it_has_alone():
    """What joins, ends, pauses, is masked or shares a prefix, at random, against each text alone."""
    model, random = tiny_model(tiny_tokenizer(), max_position_embeddings=4 * PAGE), np.random.default_rng(5)
    step, prompts = GraphStepOnCPU(model, 5), {}
    texts: dict[int, list[int]] = {}
    done: dict[int, int] = {}
    draws: dict[int, list[Draw]] = {}
    checked = 0

    def check(slot: int) -> None:
        nonlocal checked
        ids, start = texts[slot], prompts[slot]
        scores_SV = alone(model, np.array(ids[:-1]))[start - 1 :]
        assert ids[start:] == plain.choose(scores_SV, torch.tensor(draws[slot][: len(scores_SV)])).tolist()
        checked += len(scores_SV)

    for number in range(400):
        for slot in range(5):
            ends = slot in texts and (len(texts[slot]) > 150 or random.random() < 0.02)
            if ends and len(texts[slot]) > prompts[slot]:
                check(slot)
                del texts[slot]
            if slot not in texts and random.random() < 0.1:
                length = int(random.integers(1, 90))
                source = next((s for s in texts if done[s] >= 8), None)
                if source is not None and number % 2:
                    texts[slot] = texts[source][:8] + random.integers(2, 272, length).tolist()
                    step.copy(source, slot, 8)
                    done[slot] = 8
                else:
                    texts[slot], done[slot] = random.integers(2, 272, length).tolist(), 0
                    step.truncate(slot, 0)
                prompts[slot] = len(texts[slot])
                how = (0.0, 0, 1.0, 0.0) if random.random() < 0.5 else (0.9, 20, 0.9, 0.0)
                draws[slot] = [Draw(*how, uniform) for uniform in random.random(200)]
        segments = []
        for slot, ids in texts.items():
            if random.random() < 0.1:
                continue
            end = min(len(ids), done[slot] + int(random.integers(1, 40)))
            is_last, drawn = end == len(ids), draws[slot][len(ids) - prompts[slot] :]
            wanted = "token" if is_last else "none"
            if is_last and random.random() < 0.1:
                wanted = "last"
            masked = wanted == "token" and random.random() < 0.1
            segments.append(
                Segment(
                    *(slot, done[slot], np.array(ids[done[slot] : end]), wanted, (drawn[0],) if is_last else ()),
                    following=(drawn[1],) if wanted == "token" and not masked and random.random() < 0.9 else None,
                    allowed_V=np.ones(step.vocab_size, np.bool_) if masked else None,
                )
            )
        for segment, output in zip(segments, step.compute(segments), strict=True):
            done[segment.slot] += len(segment.ids)
            texts[segment.slot] += output.tokens
    for slot in texts:
        check(slot)
    assert checked > 500


def test_another_text_in_a_slot_has_no_result_of_the_step_ahead():
    model = tiny_model(tiny_tokenizer())
    step = GraphStepOnCPU(model, 2)
    step.compute([Segment(0, 0, TEXTS[0][:20], "none"), Segment(1, 0, TEXTS[1][:20], "none")])
    (first,) = step.compute([Segment(0, 20, TEXTS[0][20:21], "token", following=())])
    step.copy(1, 0, 20)
    step.compute([Segment(1, 20, TEXTS[0][20:21], "token")])
    asked = Segment(0, 21, np.array(first.tokens), "token")
    step.compute([Segment(0, 20, TEXTS[0][20:21], "none")])
    (found,) = step.compute([asked])
    ids = np.array([*TEXTS[1][:20], TEXTS[0][20], *first.tokens])
    assert found.tokens == (int(alone(model, ids)[-1].argmax()),)
    # Nor has a segment that is chosen in another way.
    step.compute([asked._replace(start=22, ids=np.array(found.tokens), following=())])
    drawn = Draw(2.0, 0, 1.0, 0.0, 0.999)
    sequence = [*ids, *found.tokens]
    third = int(alone(model, np.array(sequence))[-1].argmax())
    (found,) = step.compute([Segment(0, 23, np.array([third]), "token", (drawn,))])
    scores_V = alone(model, np.array([*sequence, third]))[-1]
    assert found.tokens[0] == int(plain.choose(scores_V[None], torch.tensor([drawn]))[0])


@torch.inference_mode()
def test_a_slot_with_another_prefix_or_other_penalties_has_no_result_of_the_step_ahead():
    model = tiny_model(tiny_tokenizer())
    step = GraphStepOnCPU(model, 2)
    drawn = Draw(1.0, 0, 1.0, 0.0, 0.5)  # any other logits give another token
    for change in ("copied", "adjusted"):
        assert step.adjust(0, Adjustment([], 1.0, 0.0, 0.0, {}))
        step.compute([Segment(slot, 0, TEXTS[slot][:20], "none") for slot in range(2)])
        (first,) = step.compute([Segment(0, 20, TEXTS[0][20:21], "token", following=(drawn,), is_adjusted=True)])
        step.compute([Segment(1, 20, TEXTS[2][:1], "none")])
        ids = [*TEXTS[0][:21], *first.tokens]
        scores_V = alone(model, np.array(ids))[-1]
        stale = draw_token(scores_V, drawn)
        if change == "copied":
            step.copy(1, 0, 21)
            scores_V = alone(model, np.array([*TEXTS[1][:20], TEXTS[2][0], *first.tokens]))[-1]
        else:
            assert step.adjust(0, Adjustment([], 1.0, 0.0, 0.0, {stale: -100.0}))
            scores_V[stale] = -torch.inf
        (found,) = step.compute([Segment(0, 21, np.array(first.tokens), "token", (drawn,), is_adjusted=True)])
        assert found.tokens == (draw_token(scores_V, drawn),) != (stale,), change


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
    broken, well = step.compute([Segment(slot, 9, TEXTS[slot][9:10], "token", following=()) for slot in range(2)])
    assert broken.tokens == (None,) and well.tokens == (int(alone(model, TEXTS[1][:10])[-1].argmax()),)
    step.clear(0)
    (found,) = step.compute([Segment(0, 0, TEXTS[2][:9])])
    torch.testing.assert_close(found.logits_RV[0], alone(model, TEXTS[2][:9])[-1], atol=2e-4, rtol=1e-4)


def test_a_page_taken_ahead_for_a_text_that_ends_is_free_again():
    step = GraphStepOnCPU(tiny_model(tiny_tokenizer(), max_position_embeddings=4 * PAGE), 2)
    ids = np.arange(PAGE) % 270 + 2
    step.compute([Segment(slot, 0, ids[:-1], "none") for slot in range(2)])
    first = step.compute([Segment(slot, PAGE - 1, ids[-1:], "token", following=()) for slot in range(2)])
    assert step._cache.used_pages == 4  # the next tokens begin a page
    # One text goes on, the other has ended; then both have.
    step.compute([Segment(0, PAGE, np.array(first[0].tokens), "token", following=())])
    assert step._cache.used_pages == 3
    step.truncate(0, PAGE)
    step.compute([Segment(1, 0, ids[:1], "none")])
    assert step._cache.used_pages == 2


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
