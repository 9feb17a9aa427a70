"""One process of a training that `start.py` started: `python -m model.training.launch.worker JOB`, under torchrun.

It runs the training of the job and appends its reports to a separate file in the scratch folder.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import PipelineError, TransientError
from model.settings import ExperimentSettings
from model.system.lifeline import Presence, end_with_input
from model.training.launch.job import PRESENCE, REPORTS
from model.training.train import train


def main() -> int:
    """Train; status 1 after an error that is reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m model.training.launch.worker", description=__doc__.split("\n")[0])
    parser.add_argument("job", type=Path, help="job.json in the scratch folder of the training")
    parser.add_argument("--end-with-input", action="store_true", help="end when standard input does")
    arguments = parser.parse_args()
    if arguments.end_with_input:
        end_with_input(after_parent=True)
    job = json.loads(arguments.job.read_text())
    scratch = Path(job["scratch"])
    presence = Presence(scratch / PRESENCE)
    presence.hold()
    with (scratch / REPORTS / f"rank-{os.environ['RANK']}.jsonl").open("a", buffering=1) as file:

        def report(**values: Any) -> None:
            file.write(json.dumps(values) + "\n")

        settings = ExperimentSettings.from_record(job["settings"])
        try:
            expect_devices(settings.training.device, int(os.environ["LOCAL_WORLD_SIZE"]))
            summary = train(
                settings,
                Path(job["dataset"]),
                Path(job["output"]),
                scratch,
                log=lambda message: report(log=message),
                on_metrics=lambda step, metrics: report(step=step, metrics=metrics),
                shares_batch=True,
            )
        except PipelineError as error:
            report(error=str(error), is_transient=isinstance(error, TransientError))
            return 1
        if os.environ["RANK"] == "0":
            report(summary=asdict(summary))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def expect_devices(device: str, processes: int) -> None:
    """Raises PipelineError if this host has GPUs, but fewer than `processes`. device: `training.device`."""
    gpus = torch.cuda.device_count()
    if (device == "cuda" or (device == "auto" and gpus)) and processes > gpus:
        raise PipelineError(
            f"compute.processes is {processes}: expected at most the {gpus} GPUs of {os.uname().nodename}, one for "
            "each process; lower it, or set training.device=cpu"
        )


if __name__ == "__main__":
    raise SystemExit(main())
