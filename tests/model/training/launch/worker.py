"""One process of a distributed training: python worker.py DATASET OUTPUT SCRATCH [STOP_AT_STEP], under torchrun."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from model.training.checkpoints import local as checkpoints
from model.training.train import train
from tests.model.training.tiny import experiment


def main() -> None:
    torch.set_num_threads(1)
    dataset, output, scratch = (Path(argument) for argument in sys.argv[1:4])
    stop_at = int(sys.argv[4]) if len(sys.argv) > 4 else None

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)  # reaches the first process alone: it reports the metrics

    def commit_slowly(scratch_dir: Path, step: int) -> None:
        time.sleep(1)
        commit(scratch_dir, step)

    commit = checkpoints.commit
    if stop_at is not None:
        checkpoints.commit = commit_slowly  # the other process ends meanwhile, if it does not wait
    settings = experiment(per_device_train_batch_size=1)
    settings.model.attention_dropout = 0.0  # each process draws its own
    try:
        train(settings, dataset, output, scratch, on_metrics=on_metrics)
    except KeyboardInterrupt as stopped:  # which torch takes for success in a forked process
        raise SystemExit(str(stopped)) from None


main()
