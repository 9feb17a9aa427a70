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
from model.generation.steps.step import Segment, SegmentOutput, Step

LONG, SHORT = 300, 20
"""Tokens of the texts: one alone takes more than one pass of prefill, and several pages."""
LONGEST = 4096
"""Of one text at most, whose last token alone is compared."""
MOST_ROWS = 64
"""More take the same kernels, and seconds to compare."""
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Root mean square difference of the logits over their standard deviation; of rounding, a tenth of it."""
MAX_SHARE = 1e-3
"""Of all probability, by which a sample may lie beside the token whose share of it the random number names."""
TURNS = 8
_PENALTIES = (1.3, 0.4, 0.7)
_DRAWS = (Draw(0.8, 0, 1.0, 0.0, 0.37), Draw(1.0, 20, 0.9, 0.0, 0.61), Draw(1.3, 0, 0.8, 0.05, 0.93))


def check(step: Step, model: PreTrainedModel, most_rows: int) -> None:
    """Raises PipelineError, one line, if logits or tokens differ from the reference's: those of a text as long as it
    may be, and in steps of 1, 2, 4 and more rows, up to `most_rows`, those that it computes ahead among them.
    """
    reference = ReferenceStep(model, 1)
    ids = np.arange(min(LONGEST, step.context_length), dtype=np.int64) * 7919 % step.vocab_size
    (whole,) = reference.compute([Segment(0, 0, ids[:LONG], "all")])
    if not bool(whole.logits_RV.isfinite().all()):
        return  # broken weights, which the first token of the service finds
    comparison = _Comparison(step, whole.logits_RV, MAX_DIFFERENCE[str(model.dtype).removeprefix("torch.")])
    for rows in [1 << power for power in range(min(most_rows, MOST_ROWS).bit_length())]:
        comparison.check_rows(rows, ids[:LONG])
        for slot in range(rows):
            step.clear(slot)
    reference.clear(0)
    segment = Segment(0, 0, ids)
    (expected,), (found,) = reference.compute([segment]), step.compute([segment])
    comparison.check(segment, found, expected.logits_RV[0], f"in a text of {len(ids):,} tokens")
    step.clear(0)


class _Comparison:
    """Of a step with the reference. expected_SV: its logits after each of the tokens. limit: of MAX_DIFFERENCE."""

    def __init__(self, step: Step, expected_SV: Tensor, limit: float) -> None:
        self._step, self._expected_SV, self._limit = step, expected_SV, limit
        self._spread = float(expected_SV.std())

    def check_rows(self, rows: int, ids: np.ndarray) -> None:
        """Compare steps of as many rows, of texts that are beginnings of `ids`."""
        step, where = self._step, f"in a step of {rows} rows"
        # The texts have several lengths, so that the rows' results differ.
        length = len(ids) if rows == 1 else min(SHORT, len(ids))
        starts = [length - 3 - slot % 8 for slot in range(rows)]
        step.compute([Segment(slot, 0, ids[:start], "none") for slot, start in enumerate(starts)])
        adjustments = [Adjustment(ids[:start].tolist(), *_PENALTIES, {slot: 2.0}) for slot, start in enumerate(starts)]
        adjusts = all(step.adjust(slot, adjustment) for slot, adjustment in enumerate(adjustments))

        def expected(segment: Segment) -> Tensor:
            scores_V = self._expected_SV[segment.start]
            if segment.is_adjusted:
                generated = ids[starts[segment.slot] : segment.start + 1]
                scores_V = _adjusted(scores_V, adjustments[segment.slot], generated)
            return scores_V

        # Once greedy, then sampled in several ways: a wrong sample may by chance be that of one random number.
        for turn in range(TURNS):
            segments = [
                Segment(
                    *(slot, start, ids[start : start + 1], "last", _draws(slot + turn, turn)),
                    is_adjusted=adjusts and (slot + turn) % 2 == 1,
                    allowed_V=_allowed(step.vocab_size, slot) if adjusts and (slot + turn) % 3 == 2 else None,
                )
                for slot, start in enumerate(starts)
            ]
            for segment, output in zip(segments, step.compute(segments), strict=True):
                self.check(segment, output, expected(segment), where)
        if not adjusts:
            return
        # Only the token that follows in `ids` is allowed, so that the one after it, which is computed ahead, is known.
        only = [_only(step.vocab_size, ids[start + 1]) for start in starts]
        segments = [
            segment._replace(logits="token", draws=(), following=_draws(segment.slot, 1), allowed_V=allowed_V)
            for segment, allowed_V in zip(segments, only, strict=True)
        ]
        step.compute(segments)
        segments = [
            Segment(
                *(s.slot, s.start + 1, ids[s.start + 1 : s.start + 2], "token", _draws(s.slot, 1)),
                is_adjusted=s.is_adjusted,
            )
            for s in segments
        ]
        # The second token of each in this call follows one that the device chooses, so only its choice is compared.
        two = [segment._replace(draws=2 * segment.draws, steps=2) for segment in segments]
        ahead = [output.tokens for output in step.compute(two)]
        again = step.compute([segment._replace(logits="last") for segment in segments])
        for segment, tokens, known in zip(segments, ahead, again, strict=True):
            self.check(segment, known._replace(tokens=tokens), expected(segment), where)
        after = [
            segment._replace(start=segment.start + 1, ids=np.array(tokens[:1], dtype=np.int64), logits="last")
            for segment, tokens in zip(segments, ahead, strict=True)
        ]
        for segment, tokens, known in zip(after, ahead, step.compute(after), strict=True):
            self.check_choice(segment, known.logits_RV[0], tokens[1], where)

    def check(self, segment: Segment, output: SegmentOutput, expected_V: Tensor, where: str) -> None:
        """Compare logits, and the token with them. where: they were found."""
        found_V = output.logits_RV[0]
        if segment.allowed_V is not None:
            allowed_V = torch.from_numpy(segment.allowed_V).to(found_V.device)
            # What is not allowed must be -infinity, else the difference is.
            excess_V = torch.where(allowed_V, found_V - expected_V, found_V.nan_to_num(neginf=0.0))
        else:
            excess_V = found_V - expected_V
        difference = float(excess_V.square().mean().sqrt()) / self._spread
        wrong = f"the step {self._step.name!r} is wrong on this machine: {where}"
        if not difference <= self._limit:
            raise PipelineError(
                f"{wrong} its logits differ from the reference's by {difference:.3g} of their standard deviation, "
                f"expected at most {self._limit:g}"
            )
        self.check_choice(segment, found_V, output.tokens[0], where)

    def check_choice(self, segment: Segment, logits_V: Tensor, token: int | None, where: str) -> None:
        """Compare a token with the logits from which it was chosen."""
        if not _is_sample(logits_V, segment.draws, token):
            raise PipelineError(
                f"the step {self._step.name!r} is wrong on this machine: {where} it chose token {token}, which "
                f"{segment.draws[0] if segment.draws else 'the highest logit'} does not name"
            )


def _allowed(vocab_size: int, number: int) -> np.ndarray:
    return (np.arange(vocab_size) + number) % 3 > 0


def _only(vocab_size: int, token: int) -> np.ndarray:
    return np.arange(vocab_size) == token


def _adjusted(logits_V: Tensor, how: Adjustment, generated: np.ndarray) -> Tensor:
    generated_S = torch.from_numpy(generated).to(logits_V.device)
    count_V = generated_S.bincount(minlength=len(logits_V)).to(logits_V.dtype)
    seen = torch.tensor(how.prompt_ids, device=logits_V.device)
    scores_V = penalized(logits_V, how, count_V.bool().index_fill_(0, seen, True), count_V)
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
