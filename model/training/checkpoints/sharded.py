"""Checkpoints of a sharded training: each process writes its part (torch.distributed.checkpoint).

The files lie in the same folder, and are committed in the same way, as those of an unsharded training
(`checkpoints/local.py`). They load into any number of processes, into a sharded model and a whole one.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard

from model.errors import PipelineError

METADATA = ".metadata"
"""Written last by torch.distributed.checkpoint: where each part of each tensor is."""
GROUPS = "optimizer_groups.pt"
"""The optimizer's parameter groups without the parameters."""
_WEIGHT, _STATE = "model.", "optimizer."


def is_sharded_checkpoint(checkpoint: Path) -> bool:
    """Whether a sharded training wrote this checkpoint."""
    return (checkpoint / METADATA).is_file()


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer state; every process calls this.

    Raises OSError in all processes if one of them cannot write.
    """
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        tensors[_WEIGHT + name] = parameter.detach()
        tensors |= {f"{_STATE}{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    try:
        dcp.save(tensors, checkpoint_id=checkpoint)
    except CheckpointException as error:
        raise OSError(_reason(error)) from error
    if dist.get_rank() == 0:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        torch.save(groups, checkpoint / GROUPS)


def load_weights(checkpoint: Path, model: nn.Module, *, alone: bool = False) -> None:
    """Read the weights into `model`, sharded or whole.

    alone: this process reads by itself; else all processes call this together. Raises PipelineError for a checkpoint
    that is damaged or of another model.
    """
    _read(checkpoint, {_WEIGHT + name: parameter.detach() for name, parameter in model.named_parameters()}, alone)


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the state of `optimizer`, of a sharded model or a whole one. Raises PipelineError as `load_weights` does."""
    try:
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        groups = torch.load(checkpoint / GROUPS, weights_only=True)
    except Exception as error:
        raise _damaged(checkpoint, str(error)) from error
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = {}
        prefix = f"{_STATE}{name}."
        for key, stored_as in stored.items():
            if key.startswith(prefix) and isinstance(stored_as, TensorStorageMetadata):
                state[key.removeprefix(prefix)] = tensors[key] = _empty(parameter, stored_as)
        optimizer.state[parameter] = state
    _read(checkpoint, tensors, alone=False)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


def _empty(parameter: Tensor, stored_as: TensorStorageMetadata) -> Tensor:
    """Memory for a stored state of `parameter`, sharded as it is if it has rows."""
    shape, dtype = stored_as.size, stored_as.properties.dtype
    if not isinstance(parameter, DTensor) or not shape:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    rows = parameter.to_local().shape[0]
    own = torch.zeros((rows, *shape[1:]), dtype=dtype, device=parameter.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, parameter.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _read(checkpoint: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of `alone`
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=alone or not dist.is_initialized())
    except CheckpointException as error:
        raise _damaged(checkpoint, _reason(error)) from error


def _reason(error: CheckpointException) -> str:
    first = next(iter(error.failures.values()), None)
    cause = first[0] if first else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _damaged(checkpoint: Path, reason: str) -> PipelineError:
    return PipelineError(
        f"the sharded checkpoint {checkpoint} cannot be read: {reason}; delete it to go on from the one before, or "
        f"delete {checkpoint.parent} to start over"
    )
