"""Launches the training of the tests: python launcher.py DATASET OUTPUT SCRATCH; a test ends it in between."""

import sys
from pathlib import Path

from model.training.launch.start import launch
from tests.model.training.launch.tiny import two_processes

if __name__ == "__main__":
    dataset, output, scratch = (Path(argument) for argument in sys.argv[1:])
    launch(two_processes(), dataset, output, scratch)
