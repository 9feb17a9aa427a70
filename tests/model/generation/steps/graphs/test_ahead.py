"""What the graphs step computes in advance, and several tokens in a call: each text has those that it has alone."""

import numpy as np
import pytest
import torch

from model.generation.steps.draw import Adjustment, Draw, draw_token
from model.generation.steps.graphs import plain
from model.generation.steps.graphs.pages import PAGE
from model.generation.steps.graphs.passes import MOST_CHAINED, Passes
from model.generation.steps.graphs.step import SHORTENED_AFTER, GraphStep
from model.generation.steps.step import Segment
from tests.support.graphs import TEXTS, GraphStepOnCPU, alone
from tests.support.tiny import tiny_model, tiny_tokenizer


def decode(step: GraphStep, texts: list[list[int]], count: int, draws: list[list[Draw]] | None, ahead: bool) -> None:
    """Append `count` tokens to each text, as the scheduler does. draws: of each text and token."""
    step.compute([Segment(slot, 0, np.array(ids[:-1]), "none") for slot, ids in enumerate(texts)])
    for number in range(count):
        segments = []
        for slot, ids in enumerate(texts):
            chosen = [() if draws is None else (draws[slot][number + i],) for i in range(2)]
            following = (chosen[1] or (None,)) if ahead and number < count - 1 else ()
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


@pytest.mark.parametrize("sampled", [False, True])
def test_several_tokens_in_a_call_are_those_of_one_after_the_other(sampled, passes):
    model, numbers = tiny_model(tiny_tokenizer()), np.random.default_rng(1)
    draws = [[Draw(0.9, 0, 0.95, 0.0, u) for u in numbers.random(41)] for _ in range(3)] if sampled else None
    expected = [TEXTS[slot][:9].tolist() for slot in range(3)]
    decode(GraphStepOnCPU(model, 4), expected, 40, draws, ahead=False)
    step, texts = GraphStepOnCPU(model, 4), [TEXTS[slot][:9].tolist() for slot in range(3)]
    step.compute([Segment(slot, 0, np.array(ids[:-1]), "none") for slot, ids in enumerate(texts)])
    passes.clear()
    while any(len(ids) < 49 for ids in texts):
        segments = []
        for slot, ids in enumerate(texts):
            done, left = len(ids) - 9, 49 - len(ids)
            if not left:
                continue
            # As many for each text, or not; what was launched in advance is taken in other portions.
            steps = min(int(numbers.integers(1, 5)), left)
            ahead = min(int(numbers.integers(0, 5)), left - steps)
            how = draws[slot][done : done + steps + ahead] if draws else [None] * (steps + ahead)
            chosen = tuple(how[:steps]) if draws else ()
            segments.append(
                Segment(
                    *(slot, len(ids) - 1, np.array(ids[-1:]), "token", chosen),
                    following=tuple(how[steps:]),
                    steps=steps,
                )
            )
        for segment, output in zip(segments, step.compute(segments), strict=True):
            assert len(output.tokens) == segment.steps
            texts[segment.slot] += output.tokens
    assert texts == expected
    assert sum(passes) == 3 * 40  # no token was computed twice


def test_calls_have_more_tokens_while_the_device_waits_for_the_host(monkeypatch):
    model = tiny_model(tiny_tokenizer(), max_position_embeddings=1024)
    ids, waits = TEXTS[0][:9].tolist(), [True]
    step = GraphStepOnCPU(model, 2)
    monkeypatch.setattr(Passes, "are_done", property(lambda _: waits[0]))
    step.compute([Segment(0, 0, np.array(ids[:-1]), "none")])

    def call() -> int:
        (count,) = step.chained(8, [100])
        asked = Segment(0, len(ids) - 1, np.array(ids[-1:]), "token", following=(None,) * count, steps=count)
        ids.extend(*[output.tokens for output in step.compute([asked])])
        return count

    assert [call() for _ in range(6)] == [1, 1, 2, 3, MOST_CHAINED, MOST_CHAINED]
    waits[0] = False
    found = [call() for _ in range(3 * SHORTENED_AFTER + 1)]
    assert sorted(set(found), reverse=True) == [4, 3, 2, 1] and found[-1] == 1
    assert step.chained(8, [100, 1]) == [1, 1]
    assert ids[9:40] == alone(model, np.array(ids[:39]))[8:].argmax(dim=1).tolist()


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
        segments = [Segment(s, len(texts[s]) - 1, np.array(texts[s][-1:]), "token", following=(None,)) for s in running]
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

    def token(slot: int, start: int, ids: np.ndarray, following: tuple = (None,), **more: object) -> Segment:
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


@pytest.mark.medium
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
            steps = int(random.integers(1, 5)) if wanted == "token" and not masked else 1
            ahead = int(random.integers(0, 5))
            segments.append(
                Segment(
                    *(
                        slot,
                        done[slot],
                        np.array(ids[done[slot] : end]),
                        wanted,
                        tuple(drawn[:steps]) if is_last else (),
                    ),
                    following=tuple(drawn[steps:][:ahead]) if wanted == "token" and not masked else (),
                    steps=steps,
                    allowed_V=np.ones(step.vocab_size, np.bool_) if masked else None,
                )
            )
        for segment, output in zip(segments, step.compute(segments), strict=True):
            done[segment.slot] += len(segment.ids) + segment.steps - 1
            texts[segment.slot] += output.tokens
    for slot in texts:
        check(slot)
    assert checked > 500


def test_another_text_in_a_slot_has_no_result_of_the_step_ahead():
    model = tiny_model(tiny_tokenizer())
    step = GraphStepOnCPU(model, 2)
    step.compute([Segment(0, 0, TEXTS[0][:20], "none"), Segment(1, 0, TEXTS[1][:20], "none")])
    (first,) = step.compute([Segment(0, 20, TEXTS[0][20:21], "token", following=(None,))])
    step.copy(1, 0, 20)
    step.compute([Segment(1, 20, TEXTS[0][20:21], "token")])
    asked = Segment(0, 21, np.array(first.tokens), "token")
    step.compute([Segment(0, 20, TEXTS[0][20:21], "none")])
    (found,) = step.compute([asked])
    ids = np.array([*TEXTS[1][:20], TEXTS[0][20], *first.tokens])
    assert found.tokens == (int(alone(model, ids)[-1].argmax()),)
    # Nor has a segment that is chosen in another way.
    step.compute([asked._replace(start=22, ids=np.array(found.tokens), following=(None,))])
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


def test_a_page_taken_ahead_for_a_text_that_ends_is_free_again():
    step = GraphStepOnCPU(tiny_model(tiny_tokenizer(), max_position_embeddings=4 * PAGE), 2)
    ids = np.arange(PAGE) % 270 + 2
    step.compute([Segment(slot, 0, ids[:-1], "none") for slot in range(2)])
    first = step.compute([Segment(slot, PAGE - 1, ids[-1:], "token", following=(None,)) for slot in range(2)])
    assert step._cache.used_pages == 4  # the next tokens begin a page
    # One text goes on, the other has ended; then both have.
    step.compute([Segment(0, PAGE, np.array(first[0].tokens), "token", following=(None,))])
    assert step._cache.used_pages == 3
    step.truncate(0, PAGE)
    step.compute([Segment(1, 0, ids[:1], "none")])
    assert step._cache.used_pages == 2
