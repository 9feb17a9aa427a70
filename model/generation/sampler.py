"""Sampling for one request: penalties, bias, temperature, top-k, top-p and min-p, in the order of `generate()`.

Each request has its own random generator and draws one number per token, so a seed gives the same text regardless of
other requests. `steps/draw.py` samples by that number.

Shapes: R rows, V vocabulary, K most likely tokens.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.generation.requests import SamplingParameters, TokenLogprob
from model.generation.steps.draw import Adjustment, Draw, draw_token, penalized

_SCORED_ROWS = 32


class Sampler:
    """Samples the tokens of one request.

    prompt_ids: counted as seen by the repetition penalty. device: of the logits.
    """

    def __init__(
        self, parameters: SamplingParameters, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._parameters, self.vocab_size = parameters, vocab_size
        self.adjustment: Adjustment = Adjustment(
            prompt_ids,
            parameters.repetition_penalty,
            parameters.frequency_penalty,
            parameters.presence_penalty,
            parameters.logit_bias or {},
        )
        """What changes the logits, for a step that does so itself."""
        self._random = random.Random(parameters.seed)
        self._cuts = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p)
        self._draws: deque[Draw] = deque()
        """Of the next tokens."""
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
        self.is_greedy: bool = parameters.temperature == 0
        self.is_plain: bool = all(change is None for change in changes)
        """Whether the next token depends on the logits as they are."""

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
        if self._parameters.temperature == 0:
            token = int(scores_V.argmax())
        else:
            token = draw_token(scores_V, self.draw())
            self.take()
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._count_V is not None:
            self._count_V[token] += 1
        return token

    def scores(self, logits_V: Tensor, forbidden: Sequence[int] = ()) -> Tensor:
        """Logits (V,) after penalties and bias, before temperature. Raises ValueError for NaN and infinity."""
        scores_V = penalized(logits_V, self.adjustment, self._seen_V, self._count_V)
        if self._bias is not None:
            scores_V = scores_V.index_add(0, *self._bias)
        if forbidden:
            scores_V = scores_V.index_fill(0, torch.tensor(list(forbidden), device=scores_V.device), -torch.inf)
        highest = scores_V.max()
        if not torch.isfinite(highest):
            raise ValueError(f"the model's highest logit is {highest.item()}: its weights or its input are broken")
        return scores_V

    def draw(self) -> Draw:
        """The next sample's parameters; the same until a token has been taken, since a failed step is repeated."""
        return self.draws(1)[0]

    def draws(self, count: int) -> tuple[Draw, ...]:
        """The parameters of the next `count` samples."""
        while len(self._draws) < count:
            self._draws.append(Draw(*self._cuts, self._random.random()))
        return tuple(islice(self._draws, count))

    def take(self, count: int = 1) -> None:
        """Drawn tokens have been taken: the next draw is another."""
        for _ in range(min(count, len(self._draws))):
            self._draws.popleft()


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Log-probabilities after one position, float32, shape (V,), and the most likely tokens as in `TokenLogprob`."""

    logprobs_V: npt.NDArray[np.float32]
    top_ids: bytes
    top_logprobs: bytes

    def of(self, token: int) -> TokenLogprob:
        """The log-probability of a token that follows."""
        return TokenLogprob(token, float(self.logprobs_V[token]), self.top_ids, self.top_logprobs)


def score_rows(rows_V: Sequence[Tensor], top: int) -> list[ScoredRow]:
    """The log-probabilities of float32 logits, each of shape (V,), computed together: for a row alone, the calls would
    take longer than the work. top: number of most likely tokens.
    """
    found: list[ScoredRow] = []
    for start in range(0, len(rows_V), _SCORED_ROWS):
        part_RV = torch.stack(list(rows_V[start : start + _SCORED_ROWS])).log_softmax(dim=-1)
        found += map(ScoredRow, part_RV.cpu().numpy(), *_most_likely(part_RV, top))
    return found


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probability of one token per row of float32 logits (R, V), with the `top` most likely alternatives."""
    found: list[TokenLogprob] = []
    # A few rows at a time, so that a long prompt needs little memory beside its logits.
    for start in range(0, len(tokens), _SCORED_ROWS):
        part_RV = logits_RV[start : start + _SCORED_ROWS].log_softmax(dim=-1)
        part = tokens[start : start + _SCORED_ROWS]
        chosen = part_RV.gather(1, torch.tensor(part, device=part_RV.device)[:, None])[:, 0].tolist()
        found += map(TokenLogprob, part, chosen, *_most_likely(part_RV, top))
    return found


def _most_likely(logprobs_RV: Tensor, top: int) -> tuple[list[bytes], list[bytes]]:
    """Ids and log-probabilities of each row's most likely tokens, as in `TokenLogprob`."""
    best_RK, ids_RK = torch.topk(logprobs_RV, min(top, logprobs_RV.shape[1]))
    ids, best = ids_RK.int().cpu().numpy(), best_RK.cpu().numpy()
    return [row.tobytes() for row in ids], [row.tobytes() for row in best]
