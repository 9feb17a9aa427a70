"""Choosing the next token of one request: penalty, temperature, top-k, top-p, in the order of `generate()`.

Each request has a generator of its own, so a seed gives the same text whatever else runs. With `torch.manual_seed(s)`
and the same parameters `generate(do_sample=True)` draws the same tokens as `seed=s` does here, on the CPU.

Shapes: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.generation.requests import SamplingParameters


class Sampler:
    """Draws one token after another for one request.

    prompt_ids: tokens that the repetition penalty counts as seen. device: where the logits are.
    """

    def __init__(
        self, parameters: SamplingParameters, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._parameters = parameters
        self._seen_V: Tensor | None = None
        if parameters.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
        self._generator: torch.Generator | None = None
        if parameters.temperature > 0:
            self._generator = torch.Generator(device)
            if parameters.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(parameters.seed)

    def next(self, logits_V: Tensor) -> int:
        """The next token, given the logits after the last one, shape (V,).

        Raises ValueError where the logits are not numbers: drawing from them would give any token.
        """
        scores_V = logits_V.float()
        if self._seen_V is not None:
            penalty = self._parameters.repetition_penalty
            penalized_V = torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
            scores_V = torch.where(self._seen_V, penalized_V, scores_V)
        highest, best = scores_V.max(dim=-1)
        if not torch.isfinite(highest):
            raise ValueError(f"the model's highest logit is {highest.item()}: its weights or its input are broken")
        token = int(best) if self._generator is None else self._draw(scores_V)
        if self._seen_V is not None:
            self._seen_V[token] = True
        return token

    def _draw(self, scores_V: Tensor) -> int:
        parameters = self._parameters
        scores_V = scores_V / parameters.temperature
        if 0 < parameters.top_k < len(scores_V):
            smallest_kept = torch.topk(scores_V, parameters.top_k).values[-1]
            scores_V = scores_V.masked_fill(scores_V < smallest_kept, -torch.inf)
        if parameters.top_p < 1:
            sorted_V, order_V = scores_V.sort()
            # From the least likely up: what together holds at most 1 - top_p goes. The most likely token always stays.
            drop_V = sorted_V.softmax(dim=-1).cumsum(dim=-1) <= 1 - parameters.top_p
            drop_V[-1] = False
            scores_V = scores_V.masked_fill(drop_V.scatter(0, order_V, drop_V), -torch.inf)
        return int(torch.multinomial(scores_V.softmax(dim=-1), 1, generator=self._generator))
