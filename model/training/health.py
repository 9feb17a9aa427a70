"""Detects trainings that do not learn: zero or constant gradients, unchanged parameters, a high loss.

Each warning is a line in the log and counts in a metric; the summary keeps those that still hold at the end.
Legend: `V` vocabulary, `T` predicted tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.baselines import held_out, token_counts, unigram_bits
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings
from model.training.optim.sharded import own_part
from model.training.run import TrainingRun

COUNTED_TOKENS = 1 << 24
"""Training tokens counted for the unigram baseline: enough for each frequent token, read in 0.1 s."""
_SAMPLED = 1024
_NAMED = 3


def unigram_loss(run: TrainingRun) -> float:
    """Loss of a unigram model of the training split on the windows of an evaluation, nats per token."""
    ids_T, _ = held_out(run.validation, run.settings.eval_windows)
    counts_V = token_counts(run.train.tokens[:COUNTED_TOKENS], len(run.train.byte_counts))
    return unigram_bits(counts_V, ids_T) * float(np.log(2)) / max(len(ids_T), 1)


class ParameterMotion:
    """Tracks parameters that keep their initial values in this process, by comparing a sample of each.

    Of sharded parameters, this process's rows.
    """

    def __init__(self, model: RexForCausalLM, step: int) -> None:
        self._model, self._first_step = model, step
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        trained = [(name, parameter) for name, parameter in trained if own_part(parameter).numel()]
        self._before = {name: _sample(parameter) for name, parameter in trained}

    def unmoved(self, step: int) -> list[str]:
        """Names of parameters that no step has changed; empty before the second step."""
        if step < self._first_step + 2:
            return []
        now = dict(self._model.named_parameters())
        same = {name: torch.equal(_sample(now[name]), before) for name, before in self._before.items()}
        return [name for name, is_same in same.items() if is_same]


def _sample(parameter: Tensor) -> Tensor:
    flat = own_part(parameter.detach()).flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)].clone()


def find_warnings(
    history: Sequence[dict[str, Any]], settings: TrainingSettings, unigram: float, unmoved: Sequence[str]
) -> list[str]:
    """Current warnings, one line each.

    history: the Trainer's log. unigram: `unigram_loss`. unmoved: `ParameterMotion.unmoved`.
    """
    found = []
    norms = [(entry["step"], float(entry["grad_norm"])) for entry in history if "grad_norm" in entry]
    # Without clipping, transformers reports no norm, or 0.
    if settings.max_grad_norm and norms:
        if zeros := [step for step, norm in norms if norm == 0]:
            found.append(f"the gradient norm is exactly 0 at step {zeros[0]:,} and {len(zeros) - 1:,} later log lines")
        latest = [norm for _, norm in norms[-settings.watch_repeats :]]
        if len(latest) == settings.watch_repeats and len(set(latest)) == 1 and latest[0]:
            found.append(
                f"the gradient norm is {latest[0]:.6g} in the last {len(latest)} log lines: it does not change"
            )
    late = settings.watch_after * settings.max_steps
    step = history[-1]["step"] if history else 0
    if unmoved and step >= late:
        more = f" and {len(unmoved) - _NAMED} more" if len(unmoved) > _NAMED else ""
        found.append(f"parameters unchanged at step {step:,}: {', '.join(unmoved[:_NAMED])}{more}")
    scores = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if scores and scores[-1][0] >= max(late, 1) and scores[-1][1] >= unigram:
        found.append(
            f"the validation loss is {scores[-1][1]:.4f} at step {scores[-1][0]:,}, not below the {unigram:.4f} nats "
            "per token of token frequencies"
        )
    return found
