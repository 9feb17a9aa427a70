"""A step over segments of many sequences gives each the logits that it would have alone."""

import numpy as np
import pytest
import torch

from model.generation.steps.reference import ReferenceStep
from model.generation.steps.step import Segment
from model.weights import int8
from model.weights.packed import PackedLinear, PackedRMSNorm, pack
from tests.support.tiny import SHAPES, tiny_model, tiny_tokenizer

TEXTS = [np.arange(start, start + 60) % 270 + 2 for start in (3, 70, 140, 210)]


def make(model, slots: int = 4) -> ReferenceStep:
    return ReferenceStep(model, slots)


def alone(model, ids: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_segments_in_any_company_equal_the_whole_text_alone(shape):
    model = tiny_model(tiny_tokenizer(), **shape)
    step, done = make(model), [0, 0, 0, 0]
    expected = [alone(model, ids) for ids in TEXTS]
    # Chunks beside single tokens, slots out of order, runs of neighbors with gaps.
    passes = [{2: 7}, {0: 20, 3: 5}, {2: 1, 3: 1}, {3: 1, 0: 1, 1: 9}, {0: 1, 1: 1, 2: 1, 3: 1}, {1: 1, 3: 1, 2: 12}]
    for sizes in passes:
        segments = [
            Segment(slot, done[slot], TEXTS[slot][done[slot] : done[slot] + n], "all") for slot, n in sizes.items()
        ]
        for segment, logits_RV in zip(segments, step.logits(segments), strict=True):
            rows = expected[segment.slot][segment.start : segment.start + len(segment.ids)]
            torch.testing.assert_close(logits_RV, rows, atol=2e-4, rtol=1e-4)
            done[segment.slot] += len(segment.ids)


def test_only_the_logits_that_are_wanted_are_computed():
    model = tiny_model(tiny_tokenizer())
    step = make(model)
    last, none, every = step.logits(
        [Segment(0, 0, TEXTS[0], "last"), Segment(1, 0, TEXTS[1], "none"), Segment(2, 0, TEXTS[2], "all")]
    )
    assert (len(last), len(none), len(every)) == (1, 0, 60)
    torch.testing.assert_close(last[0], alone(model, TEXTS[0])[-1], atol=2e-4, rtol=1e-4)


def test_a_text_in_chunks_without_logits_continues_as_one_segment():
    model = tiny_model(tiny_tokenizer())
    step = make(model)
    assert [len(rows) for rows in step.logits([Segment(1, 0, TEXTS[0][:30], "none")])] == [0]
    middle, other = step.logits([Segment(1, 30, TEXTS[0][30:59], "none"), Segment(3, 0, TEXTS[1])])
    assert len(middle) == 0
    torch.testing.assert_close(other[0], alone(model, TEXTS[1])[-1], atol=2e-4, rtol=1e-4)
    (last,) = step.logits([Segment(1, 59, TEXTS[0][59:])])
    torch.testing.assert_close(last[0], alone(model, TEXTS[0])[-1], atol=2e-4, rtol=1e-4)


def test_running_a_segment_again_changes_nothing():
    model = tiny_model(tiny_tokenizer())
    step = make(model)
    step.logits([Segment(0, 0, TEXTS[0][:10])])
    first = step.logits([Segment(0, 10, TEXTS[0][10:11])])[0]
    assert torch.equal(first, step.logits([Segment(0, 10, TEXTS[0][10:11])])[0])


def test_an_int8_model_gives_each_token_the_same_bits_alone_and_in_company():
    step = make(int8.quantize(tiny_model(tiny_tokenizer(), hidden_size=64, intermediate_size=128)))
    segments = [Segment(slot, 0, ids[:9]) for slot, ids in enumerate(TEXTS)]
    together = step.logits(segments)
    for segment, logits_RV in zip(segments, together, strict=True):
        torch.testing.assert_close(step.logits([segment])[0], logits_RV, atol=1e-5, rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    model = tiny_model(tiny_tokenizer()).to(torch.bfloat16)
    step = make(model)
    (logits_RV,) = step.logits([Segment(0, 0, TEXTS[0])])
    assert step.cache.keys[0].dtype == torch.bfloat16 and logits_RV.dtype == torch.float32
    expected = alone(model, TEXTS[0])[-1]
    assert torch.nn.functional.cosine_similarity(logits_RV[0], expected, dim=0) > 0.999


def test_the_weights_are_shared_and_the_given_model_stays_as_it_was():
    model = tiny_model(tiny_tokenizer())
    step = make(model)
    assert step.model is not model
    for mine, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        assert mine is theirs
    assert model.config._attn_implementation == "sdpa"


def test_packed_layers_give_the_same_and_only_large_ones_are_packed():
    model = tiny_model(tiny_tokenizer(), hidden_size=512, intermediate_size=1024).float()
    plain, packed = make(model), make(model)
    pack(packed.model)
    kinds = {name: type(module) for name, module in packed.model.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"] is PackedLinear
    assert kinds["model.layers.0.self_attn.k_proj"] is torch.nn.Linear  # 256 x 512 is small
    assert kinds["model.norm"] is PackedRMSNorm
    assert not any(isinstance(module, PackedLinear | PackedRMSNorm) for module in plain.model.modules())
    for segments in ([Segment(0, 0, TEXTS[0])], [Segment(0, 60, TEXTS[1][:1]), Segment(1, 0, TEXTS[1][:1])]):
        for mine, theirs in zip(packed.logits(segments), plain.logits(segments), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
