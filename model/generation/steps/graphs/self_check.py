"""Compares the graphs step with the reference when it is created: a kernel that computes something else on some GPU or
with some version is refused before it serves a text.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.errors import PipelineError
from model.generation.steps.draw import Adjustment, Draw, candidates, penalized
from model.generation.steps.reference import ReferenceStep
from model.generation.steps.step import Segment, Step

LONG, SHORT = 300, 20
"""Tokens of the texts: one alone takes more than one pass of prefill, and several pages."""
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Root mean square difference of the logits over their standard deviation; of rounding, a tenth of it."""
MAX_SHARE = 1e-3
"""Of all probability, by which a sample may lie beside the token whose share of it the random number names."""
TURNS = 8
_PENALTIES = (1.3, 0.4, 0.7)
_DRAWS = (Draw(0.8, 0, 1.0, 0.0, 0.37), Draw(1.0, 20, 0.9, 0.0, 0.61), Draw(1.3, 0, 0.8, 0.05, 0.93))


def check(step: Step, model: PreTrainedModel, most_rows: int) -> None:
    """Raises PipelineError, one line, if logits or tokens differ from the reference's in steps of 1, 2, 4 and more
    rows, up to `most_rows`.
    """
    ids = np.arange(min(LONG, step.context_length), dtype=np.int64) * 7919 % step.vocab_size
    (expected,) = ReferenceStep(model, 1).compute([Segment(0, 0, ids, "all")])
    if not bool(expected.logits_RV.isfinite().all()):
        return  # broken weights, which the first token of the service finds
    spread, limit = float(expected.logits_RV.std()), MAX_DIFFERENCE[str(model.dtype).removeprefix("torch.")]
    for rows in [1 << power for power in range(most_rows.bit_length())]:
        # The texts have several lengths, so that the rows' results differ.
        length = len(ids) if rows == 1 else min(SHORT, len(ids))
        starts = [length - 1 - slot % 8 for slot in range(rows)]
        step.compute([Segment(slot, 0, ids[:start], "none") for slot, start in enumerate(starts)])
        adjustments = [Adjustment(ids[:start].tolist(), *_PENALTIES, {slot: 2.0}) for slot, start in enumerate(starts)]
        adjusts = all(step.adjust(slot, adjustment) for slot, adjustment in enumerate(adjustments))
        # Once greedy, then sampled in several ways: a wrong sample may by chance be that of one random number.
        for turn in range(TURNS):
            segments = [
                Segment(
                    *(slot, start, ids[start : start + 1], "last", _draws(slot + turn, turn)),
                    is_adjusted=adjusts and (slot + turn) % 2 == 1,
                )
                for slot, start in enumerate(starts)
            ]
            for segment, output in zip(segments, step.compute(segments), strict=True):
                found_V, expected_V = output.logits_RV[0], expected.logits_RV[segment.start]
                if segment.is_adjusted:
                    expected_V = _adjusted(expected_V, adjustments[segment.slot], int(segment.ids[0]))
                difference = float((found_V - expected_V).square().mean().sqrt()) / spread
                if not difference <= limit:
                    raise PipelineError(
                        f"the step {step.name!r} is wrong on this machine: in a step of {rows} rows its logits differ "
                        f"from the reference's by {difference:.3g} of their standard deviation, expected at most "
                        f"{limit:g}"
                    )
                if not _is_sample(found_V, segment.draws, output.tokens[0]):
                    raise PipelineError(
                        f"the step {step.name!r} is wrong on this machine: in a step of {rows} rows it chose token "
                        f"{output.tokens[0]}, which {segment.draws[0] if segment.draws else 'the highest logit'} does "
                        "not name"
                    )
        for slot in range(rows):
            step.clear(slot)


def _adjusted(logits_V: Tensor, how: Adjustment, generated: int) -> Tensor:
    count_V = torch.zeros_like(logits_V)
    count_V[generated] = 1
    is_seen_V = count_V.bool().index_fill_(0, torch.tensor(how.prompt_ids, device=logits_V.device), True)
    scores_V = penalized(logits_V, how, is_seen_V, count_V)
    tokens, biases = torch.tensor(list(how.bias)), torch.tensor(list(how.bias.values()))
    return scores_V.index_add(0, tokens.to(logits_V.device), biases.to(logits_V.device))


def _draws(number: int, turn: int) -> tuple[Draw, ...]:
    draw = _DRAWS[number % len(_DRAWS)]
    return (draw._replace(uniform=(draw.uniform + 0.29 * number) % 1.0),) if turn else ()


def _is_sample(scores_V: Tensor, draw: tuple[Draw, ...], token: int | None) -> bool:
    if not draw:
        return token == int(scores_V.argmax())
    ids, weights_C = candidates(scores_V, draw[0])
    place = np.flatnonzero(ids == token)
    if not len(place):
        return False
    sums_C = weights_C.cumsum() / weights_C.sum()
    before, after = sums_C[place[0]] - weights_C[place[0]] / weights_C.sum(), sums_C[place[0]]
    return bool(before - MAX_SHARE <= draw[0].uniform <= after + MAX_SHARE)
