"""FSDP2: parameters, gradients and optimizer state divided among the processes of a training (`compute.sharding`).

`fully_shard` is called here and not by accelerate, whose FSDP does nothing on a CPU, where the tests prove this one,
and whose checkpoints are not this project's. Each decoder layer is one group; embeddings, head and the last norm are
another, gathered for the whole forward pass, as tied weights must be. What needs whole tensors (the self-check) gathers
one at a time. Muon's share is `optim/sharded.py`, checkpoints are `checkpoints/sharded.py`.
Legend: `B` windows, `T` tokens, `R` rows (predicted tokens), `V` vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model.evaluation import ModelPredictor
from model.modeling_rex import RexForCausalLM
from model.system.devices import Precision


def shard_model(model: RexForCausalLM, device: torch.device, precision: Precision) -> None:
    """Divide the parameters of `model` among the processes of the default group, in place.

    In bfloat16 the layers are gathered in it: autocast would keep a whole copy of their weights for the backward pass.
    Gradients are summed in float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

    def final_hidden(ids_BT: Tensor) -> Tensor:
        hidden_BTD: Tensor = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    model.final_hidden = final_hidden  # type: ignore[assignment]
    register_fsdp_forward_method(model, "final_hidden")  # so that it gathers what `forward` gathers


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard_model` divided this model."""
    return isinstance(model, FSDPModule)


def reshard(model: torch.nn.Module) -> None:
    """Free the gathered embeddings and head of a sharded model, which a forward pass without a backward pass keeps."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one, all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: RexForCausalLM, *, keep: bool) -> dict[str, Tensor]:
    """The model's `state_dict` with whole tensors in float32 on the CPU, gathered one at a time by all processes.

    keep: whether this process gets them; else the result is empty.
    """
    found = {}
    for name, value in model.state_dict().items():
        gathered = whole(value)
        if keep:
            found[name] = gathered.float().cpu()
    return found


class ShardedPredictor(ModelPredictor):
    """Of a sharded model: all processes evaluate the same windows together."""

    def logits(self, ids_BT: Tensor, selected_BT: Tensor, rows: int) -> Iterator[Tensor]:
        """As `Predictor.logits`; leaves the model sharded."""
        try:
            yield from super().logits(ids_BT, selected_BT, rows)
        finally:
            reshard(self._model)

    def _final_hidden(self, ids_BT: Tensor) -> Tensor:
        hidden_BTD: Tensor = self._model.final_hidden(ids_BT)  # type: ignore[operator]
        return hidden_BTD
