"""Sampling for one request: penalties, bias, temperature, top-k, top-p and min-p, in the order of `generate()`.

Each request has its own random generator and draws one number per token, so a seed gives the same text regardless of
other requests. Sampling inverts the cumulative distribution of the kept tokens: one random number instead of the
vocabulary-sized vector that `torch.multinomial` draws.

Shapes: V vocabulary, C candidates, B bins.
"""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.generation.requests import SamplingParameters, TokenLogprob

BINS, BINS_PER_NAT = 1024, 32
"""Of the logarithm of a probability; the last bin has all of e^-32 and below."""


class Sampler:
    """Samples the tokens of one request.

    prompt_ids: counted as seen by the repetition penalty. device: of the logits.
    """

    def __init__(
        self, parameters: SamplingParameters, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._parameters = parameters
        self._random = random.Random(parameters.seed)
        self._bias: tuple[Tensor, Tensor] | None = None
        if parameters.logit_bias:
            tokens, biases = zip(*parameters.logit_bias.items(), strict=True)
            self._bias = torch.tensor(tokens, device=device), torch.tensor(biases, device=device)
        self._seen_V: Tensor | None = None
        if parameters.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
        self._count_V: Tensor | None = None
        if parameters.presence_penalty or parameters.frequency_penalty:
            self._count_V = torch.zeros(vocab_size, device=device)
        changes = (self._bias, self._seen_V, self._count_V)
        self.is_plain_greedy: bool = parameters.temperature == 0 and all(change is None for change in changes)
        """Whether the next token is always the one with the highest logit."""

    def next(
        self, logits_V: Tensor, forbidden: Sequence[int] = (), allowed_V: npt.NDArray[np.bool_] | None = None
    ) -> int:
        """Sample the next token from float32 logits, shape (V,).

        forbidden, allowed_V: tokens to exclude, and a mask of the allowed ones, at least one of them.
        Raises ValueError for NaN or infinite logits.
        """
        scores_V = self.scores(logits_V, forbidden)
        if allowed_V is not None:
            allowed = torch.from_numpy(allowed_V).to(scores_V.device)
            scores_V = torch.where(allowed, scores_V, -torch.inf)
            if not torch.isfinite(scores_V.max()):
                raise ValueError("the model's logits of the allowed tokens are not numbers")
        token = int(scores_V.argmax()) if self._parameters.temperature == 0 else self._draw(scores_V)
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._count_V is not None:
            self._count_V[token] += 1
        return token

    def scores(self, logits_V: Tensor, forbidden: Sequence[int] = ()) -> Tensor:
        """Logits (V,) after penalties and bias, before temperature. Raises ValueError for NaN and infinity."""
        parameters, scores_V = self._parameters, logits_V
        if self._seen_V is not None:
            penalty = parameters.repetition_penalty
            penalized_V = torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
            scores_V = torch.where(self._seen_V, penalized_V, scores_V)
        if self._count_V is not None:
            scores_V = scores_V - parameters.frequency_penalty * self._count_V
            scores_V -= parameters.presence_penalty * (self._count_V > 0)
        if self._bias is not None:
            scores_V = scores_V.index_add(0, *self._bias)
        if forbidden:
            scores_V = scores_V.index_fill(0, torch.tensor(list(forbidden), device=scores_V.device), -torch.inf)
        highest = scores_V.max()
        if not torch.isfinite(highest):
            raise ValueError(f"the model's highest logit is {highest.item()}: its weights or its input are broken")
        return scores_V

    def kept(self, scores_V: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Candidate ids, ascending, and their probabilities over that of the most likely one, each (C,).

        The order by id, unlike one by probability, does not change with the rounding of near-equal logits.
        """
        parameters, values_C = self._parameters, scores_V.cpu().numpy()
        ids = np.arange(len(values_C))
        if 0 < parameters.top_k < len(ids):
            ids = _largest(scores_V, parameters.top_k)
            values_C = values_C[ids]
        # float64, shifted to a maximum of 0, so that a temperature near 0 does not overflow.
        with np.errstate(over="ignore"):
            scaled_C = (values_C.astype(np.float64) - values_C.max()) / parameters.temperature
        weights_C = np.exp(scaled_C)
        if parameters.top_p < 1 or parameters.min_p > 0:
            # top-p is a fraction of the probability mass that top-k keeps.
            keep_C = _nucleus(scaled_C, weights_C, parameters.top_p) & (weights_C >= parameters.min_p)
            ids, weights_C = ids[keep_C], weights_C[keep_C]
        return ids, weights_C

    def _draw(self, scores_V: Tensor) -> int:
        ids, weights_C = self.kept(scores_V)
        sums_C = weights_C.cumsum()
        at = np.searchsorted(sums_C, self._random.random() * sums_C[-1], side="right")
        # Rounding may step past the last token with a nonzero probability.
        return int(ids[min(at, np.searchsorted(sums_C, sums_C[-1]))])


def _largest(scores_V: Tensor, count: int) -> np.ndarray:
    """Ids of the `count` largest scores, ascending; of equal ones, the first."""
    least, values_V = float(torch.topk(scores_V, count).values[-1]), scores_V.cpu().numpy()
    keep_V = values_V >= least
    if surplus := np.count_nonzero(keep_V) - count:
        keep_V[np.flatnonzero(values_V == least)[-surplus:]] = False
    return np.flatnonzero(keep_V)


def _nucleus(scaled_C: np.ndarray, weights_C: np.ndarray, top_p: float) -> np.ndarray:
    """A mask of the fewest largest weights with `top_p` of all weight; of equal ones, the first. scaled_C: their
    logarithms, up to 0.

    To sort all would take ten times as long for 32,000 tokens: whole bins are in or out, and only one is sorted.
    """
    bins_C = np.minimum(scaled_C * -BINS_PER_NAT, BINS - 1).astype(np.intp)
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


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probability of one token per row of float32 logits (R, V), with the `top` most likely alternatives."""
    all_RV = logits_RV.log_softmax(dim=-1)
    chosen = all_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0].tolist()
    best, ids = torch.topk(all_RV, min(top, logits_RV.shape[1]))
    ranked = zip(ids.int().cpu().numpy(), best.cpu().numpy(), strict=True)
    return [
        TokenLogprob(token, logprob, row_ids.tobytes(), row.tobytes())
        for token, logprob, (row_ids, row) in zip(tokens, chosen, ranked, strict=True)
    ]
