"""Muon for the hidden matrices and AdamW for embeddings and norms, behind one torch.optim.Optimizer.

One optimizer means one state_dict and one scheduler; the two base learning rates keep their ratio over the schedule.
torch.optim.Muon is not used: it always orthogonalizes in bfloat16, which takes 0.5 s for a 256 x 256 matrix on a CPU
without bfloat16 units against 6 ms in float32, and it processes one matrix at a time. The arithmetic is the same.
Legend: `N` matrices of one shape, `R` rows, `C` columns.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from model.settings import TrainingSettings
from model.system.devices import Precision, has_fast_bfloat16
from model.training.optim.newton_schulz import Coefficients, orthogonalize
from model.training.optim.sharded import orthogonalize_rows, own_part
from model.training.optim.shared import is_shared, orthogonalize_shared

ROW_DECAY = 0.95
"""Decay rate of the second moment of an update's rows (NorMuon)."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups with `kind="muon"` (2-D parameters only), fused AdamW on those with `kind="adamw"`.

    Muon's update is scaled by 0.2 * sqrt(max(R, C)), so that its root mean square is that of an AdamW update at the
    same learning rate ("Muon is scalable for LLM training", Moonshot 2025). Weight decay is decoupled in both.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype = torch.float32,
        newton_schulz_coefficients: Coefficients = "jordan",
        normalize_rows: bool = False,
        cautious_weight_decay: bool = False,
    ) -> None:
        """groups: each with "kind", "params", "lr", "weight_decay". Arguments after `momentum` are Muon's, see
        TrainingSettings.
        """
        defaults = {
            "betas": betas,
            "eps": 1e-8,
            "momentum": momentum,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_coefficients": newton_schulz_coefficients,
            "normalize_rows": normalize_rows,
            "cautious_weight_decay": cautious_weight_decay,
            "fused": True,  # read by load_state_dict too: AdamW's step counter then stays a float32 tensor
        }
        super().__init__(groups, defaults)
        # Not a group default, because a checkpoint would carry one machine's choice to another.
        self._newton_schulz_dtype = newton_schulz_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._muon_step(group, parameters)
            elif parameters:
                self._adamw_step(group, parameters)
        return loss

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        steps = group["newton_schulz_steps"]
        named: Coefficients = group["newton_schulz_coefficients"]
        options: dict[str, Any] = {} if named == "jordan" else {"coefficients": named}
        if parameters and isinstance(parameters[0], DTensor):
            stacks = [self._momentum_updates(group, same) for same in by_shape.values()]
            rows = [shape[0] for shape in by_shape]
            for same, update_NSC in zip(
                by_shape.values(), orthogonalize_rows(stacks, rows, steps, **options), strict=True
            ):
                self._apply_updates(group, same, update_NSC)
        elif is_shared(parameters):
            stacks = [self._momentum_updates(group, same) for same in by_shape.values()]
            for same, update_NRC in zip(by_shape.values(), orthogonalize_shared(stacks, steps, **options), strict=True):
                self._apply_updates(group, same, update_NRC)
        else:  # shape by shape: the updates of all would take as much memory as the gradients
            for same in by_shape.values():
                updates_NRC = self._momentum_updates(group, same)
                self._apply_updates(group, same, orthogonalize(updates_NRC, steps, **options))

    def _momentum_updates(self, group: dict[str, Any], parameters: list[Tensor]) -> Tensor:
        """Nesterov momentum of parameters of one shape, in the dtype of the orthogonalization; shape (N, R, C), or of
        sharded parameters this process's rows.
        """
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            gradient, momentum = own_part(parameter.grad), own_part(state["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(momentum, group["momentum"]))
        return torch.stack(updates).to(self._newton_schulz_dtype)

    def _apply_updates(self, group: dict[str, Any], parameters: list[Tensor], update_NRC: Tensor) -> None:
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        if group["normalize_rows"]:
            update_NRC = self._normalize_rows(parameters, update_NRC)
        for parameter, update_RC in zip(map(own_part, parameters), update_NRC, strict=True):
            decay = group["lr"] * group["weight_decay"]
            if group["cautious_weight_decay"]:
                parameter.addcmul_(parameter, update_RC * parameter > 0, value=-decay)
            else:
                parameter.mul_(1 - decay)
            parameter.add_(update_RC, alpha=-group["lr"] * scale)

    def _normalize_rows(self, parameters: list[Tensor], update_NRC: Tensor) -> Tensor:
        """NorMuon (https://arxiv.org/abs/2510.05491): divide rows by the root of their second moment, keeping the
        matrix norm.
        """
        means_NR1 = update_NRC.float().square().mean(-1, keepdim=True)
        moments = []
        for parameter, mean_R1 in zip(parameters, means_NR1, strict=True):
            state = self.state[parameter]
            if "row_second_moment" not in state:
                state["row_second_moment"] = _of_rows(parameter, torch.zeros_like(mean_R1))
            moments.append(own_part(state["row_second_moment"]).lerp_(mean_R1, 1 - ROW_DECAY))
        scaled_NRC = update_NRC / (torch.stack(moments).sqrt() + 1e-10).to(update_NRC.dtype)
        norms = torch.stack([value.float().norm(dim=(-2, -1), keepdim=True) for value in (update_NRC, scaled_NRC)])
        if isinstance(parameters[0], DTensor):  # of the rows of all processes
            dist.all_reduce(norms.square_())
            norms.sqrt_()
        return scaled_NRC * (norms[0] / norms[1].clamp(min=1e-10)).to(update_NRC.dtype)

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            [own_part(p) for p in parameters],
            [own_part(p.grad) for p in parameters if p.grad is not None],
            [own_part(s["exp_avg"]) for s in states],
            [own_part(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _of_rows(parameter: Tensor, own_S1: Tensor) -> Tensor:
    """A value for each row of `parameter`, sharded if it is."""
    if not isinstance(parameter, DTensor):
        return own_S1
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    return DTensor.from_local(own_S1, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, 1)), stride=(1, 1))


def parameter_groups(model: PreTrainedModel, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Embeddings, norms and hidden matrices as groups, each parameter in exactly one; norms do not decay."""
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    members: dict[str, list[nn.Parameter]] = {"embeddings": [], "norms": [], "matrices": []}
    for parameter in model.parameters():
        kind = "embeddings" if id(parameter) in embeddings else "matrices" if parameter.ndim == 2 else "norms"
        members[kind].append(parameter)
    muon = settings.optim == "muon"
    return [
        {
            "params": parameters,
            "kind": "muon" if muon and kind == "matrices" else "adamw",
            "lr": settings.muon_learning_rate if muon and kind == "matrices" else settings.learning_rate,
            "weight_decay": 0.0 if kind == "norms" else settings.weight_decay,
        }
        for kind, parameters in members.items()
        if parameters
    ]


def build_optimizer(model: PreTrainedModel, settings: TrainingSettings, precision: Precision) -> MuonAdamW:
    """The optimizer of `settings.optim`: "muon" (Muon and AdamW) or "adamw" (fused AdamW for every parameter).

    precision: the training's. Muon orthogonalizes in bfloat16 on a GPU with bfloat16 units, and on such a CPU if the
    training computes in it; else in float32.
    The first group has the base learning rate `settings.learning_rate`, which the schedule reports.
    """
    device = model.device
    use_bfloat16 = has_fast_bfloat16(device) and (device.type == "cuda" or precision == "bfloat16")
    return MuonAdamW(
        parameter_groups(model, settings),
        betas=(settings.adam_beta1, settings.adam_beta2),
        momentum=settings.muon_momentum,
        newton_schulz_steps=settings.newton_schulz_steps,
        newton_schulz_dtype=torch.bfloat16 if use_bfloat16 else torch.float32,
        newton_schulz_coefficients=settings.newton_schulz_coefficients,
        normalize_rows=settings.muon_normalize_rows,
        cautious_weight_decay=settings.muon_cautious_weight_decay,
    )
