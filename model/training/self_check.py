"""Compares loss and gradients of the training path with plain float32 on the CPU before the first step.

On some versions of PyTorch, a compiled graph on a GPU computed the right loss and gradients of exactly 0; a training
that ran for hours learned nothing. Compilers, devices, autocast, process groups and this project's own kernels are all
on that path, so one batch runs through it and through a reference: eager attention, unchunked logits, autograd.

Two windows are compared, with as many tokens as FLOPS_PER_CORE allows. A compiled model gets them in a batch of the
training's shape, with the other tokens unlabeled, so that nothing is compiled twice; since the model is causal, the
reference omits the other tokens. Where a step accumulates the gradients of several passes, the sum of two is compared.
Legend: `B` windows, `T` tokens of a window, `N` labeled tokens of one, `R` rows (predicted tokens), `V` vocabulary.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.initialization import no_init_weights

from model.errors import PipelineError
from model.logits import IGNORE_INDEX
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings
from model.system.cpu import usable_cores
from model.training.adapters import add_adapters
from model.training.run import TrainingRun
from model.training.sharding import whole, whole_weights

FLOPS_PER_CORE = 4e10
"""Floating point operations of the reference's forward and backward pass: about a second."""
MOST_CORES = 16
"""More do not make small products faster."""
MAX_TOKENS = 1024
"""Most labeled tokens of a window: several blocks of attention kernels, and of the loss."""
TOLERANCES = {"float32": 1e-3, "TF32": 0.01, "bfloat16": 0.08, "float16": 0.08}
"""Largest relative error of a gradient, ||found - expected|| / ||expected||, by the precision of the training; TF32 is
float32 with `training.arguments.tf32`.

Measured on a CPU, the largest of all parameters and heads: 2e-6 in float32; with operands rounded as in TF32 0.0016 for
the shape of `stdlib`, 0.0018 for `stdlib_30m`, 0.0027 for `gpt2_124m`; in bfloat16 0.016, 0.020 and 0.024.
"""
LOSS_TOLERANCES = {"float32": 1e-4, "TF32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
PASSES_TO_REPLAY = 2
"""Passes of a compiled model before those whose CUDA graph, if it has one, is replayed: in some versions of PyTorch,
replayed passes do not add up.
"""
_MIN_RELATIVE_NORM = 1e-6
"""Gradients with a norm below this fraction of the total norm are compared relative to that instead, because they are
mostly rounding."""
_NOT_PLAIN = ("label_smoothing_factor", "neftune_noise_alpha")

Backward = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(batch, its number of predicted tokens over all processes) to the loss; gradients are left in the model."""


@dataclass(frozen=True)
class Difference:
    """Deviation of one gradient from the reference. part: the head, if only one differs."""

    name: str
    part: str
    found: float
    expected: float
    error: float


def self_check(
    run: TrainingRun,
    model: RexForCausalLM,
    teacher: RexForCausalLM | None,
    backward: Backward,
    *,
    gradient_scale: float = 1.0,
) -> None:
    """Compare one batch; every process of a training calls this. Random state and weights are unchanged.

    model: the one that `backward` trains. gradient_scale: the factor of float16's loss scaling.
    Raises PipelineError, in all processes, with the parameter whose gradient is furthest from the reference.
    """
    if unknown := [name for name in _NOT_PLAIN if run.settings.arguments.get(name)]:
        run.log(f"self-check: skipped, as it does not support training.arguments {', '.join(unknown)}")
        return
    started = time.monotonic()
    rows, tokens = _labeled(run, model, teacher)
    # Divided by the tokens of a step, as in training, and not by these few: float16 would overflow.
    items = run.windows_per_step * (run.sequence_length - 1)
    share = items / (len(rows) * run.world_size * (tokens - 1))
    # The second pass is half as large, so that the sum tells a pass that is lost from one that is overwritten.
    divisors = [items, 2 * items] if run.settings.gradient_accumulation_steps > 1 else [items]
    total = sum(items / divisor for divisor in divisors)
    with _state_kept(run, model):
        batch = {
            name: value.to(run.device) for name, value in _batch(run, run.arguments.process_index, rows, tokens).items()
        }
        if run.settings.torch_compile and run.device.type == "cuda":
            for _ in range(PASSES_TO_REPLAY):
                backward(batch, torch.tensor(items, device=run.device))
                model.zero_grad(set_to_none=True)
        losses = [backward(batch, torch.tensor(divisor, device=run.device)).float() * share for divisor in divisors]
        found_loss = losses[0]
        if dist.is_initialized():
            dist.all_reduce(found_loss)
            found_loss /= run.world_size
        found = {
            name: torch.zeros(parameter.shape)
            if parameter.grad is None
            else whole(parameter.grad.detach()).float().cpu() * (share / gradient_scale / total)
            for name, parameter in model.named_parameters()
        }
        model.zero_grad(set_to_none=True)
    weights = whole_weights(model, keep=run.is_main_process)
    message: list[str | None] = [None]
    if run.is_main_process:
        batches = [_batch(run, rank, rows, tokens) for rank in range(run.world_size)]
        is_labeled = [(batch["labels"] != IGNORE_INDEX).any(1) for batch in batches]
        ids_BT = torch.cat([batch["input_ids"][kept, :tokens] for batch, kept in zip(batches, is_labeled, strict=True)])
        loss, expected = reference_gradients(model, teacher, ids_BT, run.settings, weights)
        worst = max(_differences(model, found, expected), key=lambda difference: difference.error)
        message = [_judge(run, found_loss.item(), loss, worst)]
        if message[0] is None:
            run.log(
                f"self-check: gradients agree with plain float32 on the CPU to {worst.error:.1e} "
                f"(at most {tolerance(run):g}; {time.monotonic() - started:.1f} s)"
            )
    if dist.is_initialized():
        dist.broadcast_object_list(message)
    if message[0] is not None:
        raise PipelineError(message[0])


def tolerance(run: TrainingRun) -> float:
    """The largest accepted relative error."""
    return run.settings.self_check_tolerance or TOLERANCES[_precision(run)]


def _precision(run: TrainingRun) -> str:
    return "TF32" if run.precision == "float32" and run.arguments.tf32 else run.precision


def reference_gradients(
    model: RexForCausalLM,
    teacher: RexForCausalLM | None,
    ids_BT: Tensor,
    settings: TrainingSettings,
    weights: dict[str, Tensor] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Reference loss and gradients: float32 on the CPU, eager attention, whole logits, autograd.

    weights: the `state_dict` of `model` with whole tensors, where the model's own are sharded.
    """
    plain = _plain_copy(model, settings, weights)
    logits_RV = plain(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels_R = ids_BT[:, 1:].flatten()
    loss_R = functional.cross_entropy(logits_RV, labels_R, reduction="none")
    loss_R = loss_R + settings.z_loss * logits_RV.logsumexp(1).square()
    if teacher is not None:
        with torch.no_grad():
            teacher_RV = _plain_copy(teacher)(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        divergence_R = plain_divergence(logits_RV, teacher_RV, settings.distill_temperature, settings.distill_top_k)
        loss_R = loss_R.lerp(divergence_R, settings.distill_weight)
    loss_R.mean().backward()
    return loss_R.mean().item(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in plain.named_parameters()
    }


def plain_divergence(logits_RV: Tensor, teacher_RV: Tensor, temperature: float, top_k: int) -> Tensor:
    """temperature^2 * KL(teacher || student), (R,); with top_k, all tokens outside the teacher's top k form one
    event.
    """
    log_q_RV, log_p_RV = ((logits / temperature).log_softmax(1) for logits in (logits_RV, teacher_RV))
    if 0 < top_k < logits_RV.shape[1]:
        top_RK = log_p_RV.topk(top_k, dim=1).indices
        is_other_RV = torch.ones_like(log_p_RV, dtype=torch.bool).scatter(1, top_RK, False)
        others = [
            log_RV.masked_fill(~is_other_RV, -math.inf).logsumexp(1, keepdim=True) for log_RV in (log_q_RV, log_p_RV)
        ]
        log_q_RV, log_p_RV = (
            torch.cat([x.gather(1, top_RK), o], 1) for x, o in zip((log_q_RV, log_p_RV), others, strict=True)
        )
    return temperature**2 * (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(1)


def _plain_copy(
    model: RexForCausalLM, settings: TrainingSettings | None = None, weights: dict[str, Tensor] | None = None
) -> RexForCausalLM:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config.attention_dropout = 0.0
    with torch.random.fork_rng(devices=[]), no_init_weights():
        plain = RexForCausalLM(config)
        if settings is not None:
            add_adapters(plain, settings)
    weights = weights or whole_weights(model, keep=True)
    plain.load_state_dict(weights)
    plain.tie_weights()
    return plain.eval()  # training mode would use the hand-written derivatives of norms and rotations


def _labeled(run: TrainingRun, model: RexForCausalLM, teacher: RexForCausalLM | None) -> tuple[list[int], int]:
    """Windows of a process's batch that have labels, and their number of labeled tokens."""
    last = run.settings.per_device_train_batch_size - 1
    rows = [0, last] if last else [0]
    parameters = model.num_parameters() + (teacher.num_parameters() if teacher is not None else 0)
    flops = FLOPS_PER_CORE * min(usable_cores(), MOST_CORES)
    affordable = int(flops / (6 * parameters * len(rows) * run.world_size))
    return rows, min(run.sequence_length, MAX_TOKENS, max(8, affordable))


def _batch(run: TrainingRun, rank: int, rows: list[int], tokens: int) -> dict[str, Tensor]:
    """The batch of one process, (B, T); without a compiler only the labeled part, (len(rows), N)."""
    size = run.settings.per_device_train_batch_size
    windows = [run.train[(rank * size + i) % len(run.train)]["input_ids"] for i in range(size)]
    input_ids_BT = torch.stack(windows)
    labels_BT = torch.full_like(input_ids_BT, IGNORE_INDEX)
    labels_BT[rows, :tokens] = input_ids_BT[rows, :tokens]
    if not run.settings.torch_compile:
        input_ids_BT, labels_BT = input_ids_BT[rows, :tokens], labels_BT[rows, :tokens]
    return {"input_ids": input_ids_BT, "labels": labels_BT}


@contextmanager
def _state_kept(run: TrainingRun, model: RexForCausalLM) -> Iterator[None]:
    """Disables dropout inside the block; restores random state and mode."""
    dropouts = {module: module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")}
    was_training = model.training
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        try:
            for module in dropouts:
                module.attention_dropout = 0.0  # type: ignore[assignment]
            yield
        finally:
            for module, dropout in dropouts.items():
                module.attention_dropout = dropout
            model.train(was_training)


def _differences(model: RexForCausalLM, found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[Difference]:
    whole = math.sqrt(sum(gradient.double().square().sum().item() for gradient in expected.values()))
    head_dim = model.config.head_dim
    assert head_dim is not None
    for name, reference in expected.items():
        gradient = found[name]
        norms = gradient.norm().item(), reference.norm().item()
        yield Difference(name, "", *norms, _relative(gradient - reference, norms[1], whole))
        heads = [gradient, reference]
        if name.endswith("o_proj.weight"):
            heads = [value.t() for value in heads]
        elif not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            continue
        parts = [value.unflatten(0, (-1, head_dim)).flatten(1) for value in heads]
        # Relative to the heads' root mean square: a head with uniform attention may have almost no gradient.
        typical = norms[1] / len(parts[1]) ** 0.5
        errors = [_relative(part, typical, whole) for part in parts[0] - parts[1]]
        head = max(range(len(errors)), key=errors.__getitem__)
        yield Difference(
            name, f" (head {head})", parts[0][head].norm().item(), parts[1][head].norm().item(), errors[head]
        )


def _relative(difference: Tensor, norm: float, whole: float) -> float:
    error = difference.norm().item() / max(norm, _MIN_RELATIVE_NORM * whole, 1e-30)
    return error if math.isfinite(error) else math.inf


def _judge(run: TrainingRun, found_loss: float, loss: float, worst: Difference) -> str | None:
    where = f"{_path(run)}; torch {torch.__version__}, transformers {transformers.__version__}"
    advice = "try another version, or set training.self_check=false to train anyway"
    if run.settings.torch_compile:
        advice = f"try training.torch_compile=false; {advice}"
    loss_error = abs(found_loss - loss) / max(abs(loss), 1e-6)
    if not loss_error <= LOSS_TOLERANCES[_precision(run)] * max(1.0, tolerance(run) / TOLERANCES[_precision(run)]):
        return (
            f"self-check: the loss of one batch is {found_loss:.6g} and {loss:.6g} in plain float32 on the CPU "
            f"({where}): {advice}"
        )
    if worst.error > tolerance(run):
        return (
            f"self-check: the gradient of {worst.name}{worst.part} has norm {worst.found:.4g} and "
            f"{worst.expected:.4g} in plain float32 on the CPU, relative error {worst.error:.3g}, expected at most "
            f"{tolerance(run):g} ({where}): {advice}"
        )
    return None


def _path(run: TrainingRun) -> str:
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    parts = [device, _precision(run)]
    if run.settings.torch_compile:
        parts.append("compiled")
    if run.world_size > 1:
        parts.append(f"{run.world_size} processes")
    return ", ".join(parts)
