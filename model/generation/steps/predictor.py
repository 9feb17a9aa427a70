"""A step of the generation engine as a predictor for `model/evaluation.py`: it scores the service's own numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.generation.steps.step import Segment, Step


class StepPredictor:
    """Computes windows one after the other in the first slot of a step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.vocab_size, self.device = step.vocab_size, step.logits_device

    def logits(self, ids_BT: Tensor, selected_BT: Tensor, rows: int) -> Iterator[Tensor]:
        """Logits (rows, V), float32, of the token after each selected one, as `Predictor.logits` has them."""
        waiting = torch.empty(0, self.vocab_size, device=self.device)
        for ids_T, selected_T in zip(ids_BT[:, :-1].cpu().numpy(), selected_BT.to(self.device), strict=True):
            self._step.truncate(0, 0)
            for start in range(0, len(ids_T), rows):
                part = ids_T[start : start + rows]
                (output,) = self._step.compute([Segment(0, start, part, "all")])
                chosen = output.logits_RV[selected_T[start : start + len(part)]]  # a copy: the next call overwrites
                waiting = torch.cat([waiting, chosen])
                while len(waiting) >= rows:
                    yield waiting[:rows]
                    waiting = waiting[rows:]
        if len(waiting):
            yield waiting
