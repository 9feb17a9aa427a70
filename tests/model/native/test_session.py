"""A sequence has the same bits in any company; pages are taken, shared and given back as texts need them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.native.library import NativeModel, NativeSession, Segment, unsupported
from model.weights import int4, int8
from tests.support.tiny import tiny_model, tiny_tokenizer

PAGE = 64
SHAPE = {"hidden_size": 96, "intermediate_size": 144, "max_position_embeddings": 400, "num_hidden_layers": 2}


def text(seed: int, tokens: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 270, tokens)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4"])
def model(request):
    whole_blocks = {"head_dim": 16} if request.param == "int4" else {}
    made = tiny_model(tiny_tokenizer(), **SHAPE, **whole_blocks)
    if request.param in ("int8", "int4"):
        return {"int8": int8, "int4": int4}[request.param].quantize(made)
    return made.to(getattr(torch, request.param))


def alone(native: NativeModel, ids: np.ndarray) -> np.ndarray:
    return NativeSession(native, 1).step([Segment(0, 0, ids, len(ids))])[0]


@pytest.mark.parametrize("neighbors", [1, 2, 3, 5, 8, 15, 16, 17, 31, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_the_same_bits_whatever_runs_beside_it(model, instructions, neighbors, threads):
    native = NativeModel(model, instructions=instructions)
    ids = text(0)
    expected = alone(native, ids)
    session = NativeSession(native, neighbors + 1, threads=threads)
    done = 0
    for number, size in enumerate([37, 1, 1, 50, 1, 16, 3, 1]):
        mine = Segment(neighbors // 2, done, ids[done : done + size], size)
        others = [
            Segment(slot, 0, text(slot + 100 * number, 1 + (slot * 7 + number) % 9), 1)
            for slot in range(neighbors + 1)
            if slot != mine.slot
        ]
        order = [*others[: neighbors // 2], mine, *others[neighbors // 2 :]]
        logits, _, _ = session.step(order)
        first = neighbors // 2
        assert np.array_equal(logits[first : first + size], expected[done : done + size])
        done += size


def test_a_pass_that_may_be_shared_or_not_has_the_same_bits(model, fastest):
    """Both ways are taken in turns, as the time that they take decides."""
    native, ids = NativeModel(model, instructions=fastest), text(3, 200)
    expected = alone(native, ids)
    for weights in (10_000, 100_000, 400_000):
        session, done = NativeSession(native, 3, threads=3, shared_from=weights), 0
        for number in range(60):
            size = min(1 + number % 7, 200 - done)
            others = [Segment(slot, 0, text(slot + number, 5), 1) for slot in (0, 2)]
            logits, _, _ = session.step([others[0], Segment(1, done, ids[done : done + size], size), others[1]])
            assert np.array_equal(logits[1 : 1 + size], expected[done : done + size])
            done = (done + size) % 200


def test_a_long_step_in_several_passes_has_the_bits_of_one_token_after_the_other(model, fastest):
    native = NativeModel(model, instructions=fastest)
    session, ids = NativeSession(native, 4, threads=2), text(1, 300)
    logits, _, _ = session.step([Segment(slot, 0, ids, 300) for slot in range(4)])
    one_by_one = NativeSession(native, 1)
    expected = np.concatenate([one_by_one.step([Segment(0, i, ids[i : i + 1], 1)])[0] for i in range(300)])
    for slot in range(4):
        assert np.array_equal(logits[300 * slot : 300 * (slot + 1)], expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_that_are_computed_and_rejected_leave_no_trace(model, instructions, threads):
    """Speculative decoding: the next token and proposed ones in one step have the bits of one step each."""
    native = NativeModel(model, instructions=instructions)
    ids, wrong = text(10, 150), text(11, 150)
    one_by_one = NativeSession(native, 1)
    draws = np.array([[0.8, 40, 0.95, 0.0, uniform] for uniform in np.random.default_rng(1).random(150)])
    expected, chosen = [], []
    for at in range(150):
        row, token, _ = one_by_one.step_over([(0, at, 1, 1)], [ids[at : at + 1]], logits=True, draws=draws[at : at + 1])
        expected.append(row[0].copy())
        chosen.append(token[0])
    session, done = NativeSession(native, 2, threads=threads), [0, 0]
    numbers = np.random.default_rng(12)
    while max(done) < 140:
        parts, kept = [], []
        for slot in (0, 1):
            right, rejected = numbers.integers(1, 6), numbers.integers(0, 5)
            proposed = np.concatenate([ids[done[slot] :][:right], wrong[:rejected]])
            parts.append((slot, done[slot], len(proposed), len(proposed)))
            kept.append((proposed, right, draws[done[slot] :][: len(proposed)]))
        logits, tokens, _ = session.step_over(
            parts, [part[0] for part in kept], logits=True, draws=np.concatenate([part[2] for part in kept])
        )
        row = 0
        for slot, (proposed, right, _) in enumerate(kept):
            at = done[slot]
            assert np.array_equal(logits[row : row + right], expected[at : at + right])
            assert tokens[row : row + right].tolist() == chosen[at : at + right]
            row += len(proposed)
            done[slot] += right
            session.truncate(slot, done[slot])


def test_only_wanted_rows_come_and_a_step_may_want_none(model, fastest):
    native = NativeModel(model, instructions=fastest)
    session, ids = NativeSession(native, 3), text(2, 40)
    expected = alone(native, ids)
    logits, best, _ = session.step([Segment(0, 0, ids, 1), Segment(1, 0, ids, 0), Segment(2, 0, ids[:9], 5)])
    assert np.array_equal(logits, np.concatenate([expected[-1:], expected[4:9]]))
    assert best.tolist() == logits.argmax(axis=1).tolist()
    logits, best, _ = session.step([Segment(0, 40, ids[:5], 0)])
    assert len(logits) == len(best) == 0


def test_memory_is_taken_by_the_page_and_given_back(model, fastest):
    session = NativeSession(NativeModel(model, instructions=fastest), 8)
    page = PAGE * session.bytes_per_token
    assert session.cache_bytes == 0
    session.step([Segment(0, 0, text(3, PAGE), 1)])
    assert session.cache_bytes == page
    session.step([Segment(0, PAGE, text(4, 1), 1), Segment(5, 0, text(4, 3), 1)])
    assert session.cache_bytes == 3 * page
    session.truncate(0, PAGE)
    session.truncate(5, 0)
    assert session.cache_bytes == page


def test_a_shared_prefix_takes_no_memory_and_neither_text_disturbs_the_other(model, fastest):
    native = NativeModel(model, instructions=fastest)
    session, ids, other = NativeSession(native, 2), text(5), text(6)
    session.step([Segment(0, 0, ids, 1)])
    held = session.cache_bytes
    session.copy_prefix(0, 1, 150)
    assert session.cache_bytes == held
    branch = np.concatenate([ids[:150], other[150:]])
    logits, _, _ = session.step([Segment(1, 150, branch[150:], 50)])
    assert np.array_equal(logits, alone(native, branch)[150:])
    session.truncate(0, 160)
    logits, _, _ = session.step([Segment(0, 160, ids[160:], 40)])
    assert np.array_equal(logits, alone(native, ids)[160:])
    session.truncate(0, 0)
    logits, _, _ = session.step([Segment(1, 199, branch[199:], 1)])
    assert np.array_equal(logits, alone(native, branch)[199:])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, {**SHAPE, "post_norm": False, "qk_norm": True, "head_dim": 10}])
def test_numbers_of_a_broken_pass_do_not_reach_the_next_text(fastest, shape, quantized):
    model = tiny_model(tiny_tokenizer(), **shape)
    if quantized:
        int8.quantize(model).model.embed_tokens.weight_scale[7] = torch.nan
    else:
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = torch.nan
    native = NativeModel(model, instructions=fastest)
    session, ids = NativeSession(native, 1), np.where(text(8) == 7, 8, text(8))
    session.step([Segment(0, 0, np.full(200, 7), 1)])
    session.truncate(0, 0)
    logits, _, _ = session.step([Segment(0, 0, ids[:70], 70)])
    assert np.isfinite(logits).all()
    assert np.array_equal(logits, alone(native, ids)[:70])


def test_the_limit_of_the_cache_is_an_error_and_what_is_held_stays(model, fastest):
    native = NativeModel(model, instructions=fastest)
    session, ids = NativeSession(native, 2, cache_tokens=3 * PAGE), text(9)
    session.step([Segment(0, 0, ids[:128], 1)])
    with pytest.raises(PipelineError, match="cache of keys and values is full"):
        session.step([Segment(1, 0, ids, 1)])
    session.truncate(1, 0)
    logits, _, _ = session.step([Segment(0, 128, ids[128:190], 62)])
    assert np.array_equal(logits, alone(native, ids)[128:190])


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(2, 0, np.array([1]), 1), "there is no slot 2"),
        (Segment(-1, 0, np.array([1]), 1), "there is no slot -1"),
        (Segment(0, 65, np.array([1]), 1), "does not reach to position 65"),
        (Segment(0, 0, np.array([280]), 1), "the vocabulary has no token 280"),
        (Segment(0, 0, np.array([-1]), 1), "the vocabulary has no token -1"),
        (Segment(0, 0, np.array([], dtype=np.int64), 0), "a segment has 0 tokens"),
        (Segment(0, 0, np.array([1]), 2), "logits of 2 tokens"),
        (Segment(0, 0, np.ones(401, dtype=np.int64), 1), "position 400 is behind the context"),
    ],
    ids=str,
)
def test_a_segment_that_does_not_fit_is_one_line(fastest, segment, message):
    session = NativeSession(NativeModel(tiny_model(tiny_tokenizer(), **SHAPE), instructions=fastest), 2)
    with pytest.raises(PipelineError, match=message):
        session.step([segment])
    with pytest.raises(PipelineError, match="there is no slot 2"):
        session.truncate(2, 0)
    with pytest.raises(PipelineError, match="fewer than 10 tokens"):
        session.copy_prefix(0, 1, 10)


def test_models_that_the_library_has_no_kernels_for_are_named(fastest):
    assert unsupported(tiny_model(tiny_tokenizer())) is None
    assert "float64" in unsupported(tiny_model(tiny_tokenizer()).double())
    mixed = tiny_model(tiny_tokenizer())
    mixed.lm_head.to(torch.bfloat16)
    assert "bfloat16, float32" in unsupported(mixed)
    with pytest.raises(PipelineError, match="use the step 'reference'"):
        NativeModel(mixed)


def test_a_forked_process_drops_a_session_whose_threads_it_has_not(fastest):
    native = NativeModel(tiny_model(tiny_tokenizer()), instructions=fastest)
    session = NativeSession(native, 1, threads=3)
    session.step([Segment(0, 0, np.arange(8), 1)])
    child = os.fork()
    if child == 0:
        session.__del__()
        os._exit(0)
    end = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waited for threads that it has not")
        time.sleep(0.01)
    assert len(session.step([Segment(0, 0, np.arange(8), 1)])[1]) == 1


@pytest.mark.medium
@pytest.mark.processes
def test_a_session_that_lives_until_the_interpreter_ends_is_silent(fastest):
    imports = "from tests.model.native.test_session import *; from model.generation.steps.native import NativeStep"
    lines = [imports, "step = NativeStep.create(tiny_model(tiny_tokenizer()), 1, threads=2)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
