"""One process of a sharded training: python sharded_worker.py DATASET OUTPUT SCRATCH [RECORD], under torchrun.

RECORD: JSON with "training", options of TrainingSettings, and "dies_after", a step: while it is saved, the second
process ends after all parts are written, before the checkpoint is committed. The bytes that a process holds at the end
of the training are written beside OUTPUT.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.settings import ComputeSettings
from model.training import train as stage
from model.training.optim.sharded import own_part
from model.training.trainer import RexTrainer
from tests.model.training.launch.tiny import sharded_experiment

dataset, output, scratch = (Path(argument) for argument in sys.argv[1:4])
record = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
rank = os.environ["RANK"]


class Measuring(RexTrainer):
    """Writes what this process holds at the end, and ends in the middle of saving."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = {
            name: sum(own_part(tensor).untyped_storage().nbytes() for tensor in tensors)
            for name, tensors in {"parameters": list(self._network.parameters()), "optimizer": states}.items()
        }
        output.with_name(f"held-{rank}.json").write_text(json.dumps(held))
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)
        if self.state.global_step == record.get("dies_after") and rank == "1":
            os._exit(9)


def main() -> None:
    torch.set_num_threads(1)
    stage.RexTrainer = Measuring  # type: ignore[misc]
    settings = sharded_experiment(**record.get("training", {}))
    compute = ComputeSettings(engine="torchrun", processes=2, sharding="fsdp2")
    stage.train(
        replace(settings, compute=compute),
        dataset,
        output,
        scratch,
        log=print if rank == "0" else lambda line: None,
        shares_batch=True,
        shards_on_cpu=True,
    )


main()
