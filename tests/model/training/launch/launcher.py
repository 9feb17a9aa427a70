"""Launches the training of the tests: python launcher.py DATASET OUTPUT SCRATCH [ENGINE]; a test ends it in between."""

import sys
from dataclasses import replace
from pathlib import Path

from model.settings import ComputeSettings
from model.training.launch.start import launch
from tests.model.training.launch.tiny import one_process

if __name__ == "__main__":
    dataset, output, scratch = (Path(argument) for argument in sys.argv[1:4])
    compute = ComputeSettings(engine=sys.argv[4] if len(sys.argv) > 4 else "torchrun", processes=2)  # type: ignore[arg-type]
    launch(replace(one_process(), compute=compute), dataset, output, scratch)
