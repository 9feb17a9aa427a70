"""How a step chooses a token: the most likely one, or a sample by temperature, top-k, top-p and min-p.

Sampling inverts the cumulative distribution of the kept tokens, in the order of their ids, at one uniform number. That
order, unlike one by probability, does not change with the rounding of near-equal logits. `model/native/kernels/draw.h`
does the same in C++.

Shapes: V vocabulary, C candidates, B bins.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS, BINS_PER_NAT = 1024, 32
"""Of the logarithm of a weight; the last bin has all of e^-32 and below."""


class Draw(NamedTuple):
    """Parameters of one sample. temperature: above 0. top_k: 0 keeps all. uniform: from 0 to 1 exclusive."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


class Adjustment(NamedTuple):
    """What changes the logits of a text before each of its tokens is chosen, in this order.

    repetition: multiplies logits below 0 and divides those above it, of tokens that the prompt or the generated text
    has; 1 for none. frequency, presence: subtracted from the logit of a generated token for each of its occurrences,
    and once. bias: added to the logits of these tokens.
    """

    prompt_ids: Sequence[int]
    repetition: float
    frequency: float
    presence: float
    bias: Mapping[int, float]


def penalized(scores_V: Tensor, how: Adjustment, is_seen_V: Tensor | None, count_V: Tensor | None) -> Tensor:
    """Scores (V,) after the penalties. is_seen_V, count_V: whether the text has a token, and how often it was
    generated; None without such penalties.
    """
    if is_seen_V is not None:
        repeated_V = torch.where(scores_V < 0, scores_V * how.repetition, scores_V / how.repetition)
        scores_V = torch.where(is_seen_V, repeated_V, scores_V)
    if count_V is not None:
        scores_V = scores_V - how.frequency * count_V
        scores_V -= how.presence * (count_V > 0)
    return scores_V


def draw_token(scores_V: Tensor, draw: Draw) -> int:
    """Sample from float32 scores (V,), the highest of which is finite."""
    ids, weights_C = candidates(scores_V, draw)
    sums_C = weights_C.cumsum()
    at = np.searchsorted(sums_C, draw.uniform * sums_C[-1], side="right")
    # Rounding may step past the last token with a nonzero probability.
    return int(ids[min(at, np.searchsorted(sums_C, sums_C[-1]))])


def candidates(scores_V: Tensor, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the kept tokens, ascending, and their probabilities over that of the most likely one, each (C,)."""
    values_C = scores_V.cpu().numpy()
    ids = np.arange(len(values_C))
    if 0 < draw.top_k < len(ids):
        ids = _largest(scores_V, draw.top_k)
        values_C = values_C[ids]
    # float64, shifted to a maximum of 0, so that a temperature near 0 does not overflow.
    with np.errstate(over="ignore"):
        logs_C = (values_C.astype(np.float64) - values_C.max()) / draw.temperature
    weights_C = np.exp(logs_C)
    if draw.top_p < 1 or draw.min_p > 0:
        # top-p is a fraction of the probability mass that top-k keeps.
        keep_C = _nucleus(logs_C, weights_C, draw.top_p) & (weights_C >= draw.min_p)
        ids, weights_C = ids[keep_C], weights_C[keep_C]
    return ids, weights_C


def _largest(scores_V: Tensor, count: int) -> np.ndarray:
    """Ids of the `count` largest scores, ascending; of equal ones, the first."""
    least, values_V = float(torch.topk(scores_V, count).values[-1]), scores_V.cpu().numpy()
    keep_V = values_V >= least
    if surplus := np.count_nonzero(keep_V) - count:
        keep_V[np.flatnonzero(values_V == least)[-surplus:]] = False
    return np.flatnonzero(keep_V)


def _nucleus(logs_C: np.ndarray, weights_C: np.ndarray, top_p: float) -> np.ndarray:
    """A mask of the fewest largest weights with `top_p` of all weight; of equal ones, the first. logs_C: their
    logarithms, up to 0.

    To sort all would take ten times as long for 32,000 tokens: whole bins are in or out, and only one is sorted.
    """
    bins_C = np.minimum(logs_C * -BINS_PER_NAT, BINS - 1).astype(np.intp)
    mass_B = np.bincount(bins_C, weights_C, minlength=BINS)
    before_B = mass_B.cumsum() - mass_B
    wanted = top_p * mass_B.sum()
    last = np.searchsorted(before_B, wanted) - 1
    inside = np.flatnonzero(bins_C == last)
    inside = inside[np.argsort(-weights_C[inside], kind="stable")]
    sums = weights_C[inside].cumsum() - weights_C[inside]
    keep_C = bins_C < last
    keep_C[inside[before_B[last] + sums < wanted]] = True
    return keep_C
