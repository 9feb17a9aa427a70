"""torchrun for one host of a training: starts its processes, restarts them when one dies, ends them when it ends.

    python -m model.training.launch.agent SCRATCH/job.json

On the host that runs the stage, `start.py` starts it. On every other host of a training a person or the cluster's
scheduler does: it waits for the job, joins the others at the job's endpoint and ends with them.
"""

import argparse
import json
import os
import time
from pathlib import Path

from model.errors import PipelineError, ends_in_one_line
from model.settings import ExperimentSettings
from model.system.lifeline import Presence, end_with_input
from model.training.launch.job import PRESENCE, SHUTDOWN_S, rendezvous, worker_environment

WAIT_S = 3600.0


@ends_in_one_line
def main() -> int:
    """Run this host's processes to the end of the training."""
    parser = argparse.ArgumentParser(prog="python -m model.training.launch.agent", description=__doc__.split("\n")[0])
    parser.add_argument("job", type=Path, help="job.json in the scratch folder of the training")
    parser.add_argument(
        "--wait", type=float, default=WAIT_S, metavar="SECONDS", help=f"for the job to be there; default {WAIT_S:g}"
    )
    parser.add_argument("--end-with-input", action="store_true", help="end when standard input does")
    arguments = parser.parse_args()
    if arguments.end_with_input:
        end_with_input()
    ends_s = time.monotonic() + arguments.wait
    while not arguments.job.is_file():
        if time.monotonic() > ends_s:
            raise PipelineError(f"no {arguments.job} after {arguments.wait:g} s: expected the job of a training")
        time.sleep(1.0)
    compute = ExperimentSettings.from_record(json.loads(arguments.job.read_text())["settings"]).compute
    nodes, endpoint = rendezvous(compute)
    os.environ.update(worker_environment(compute.processes))
    presence = Presence(arguments.job.parent / PRESENCE)
    presence.hold()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "rex"] if nodes > 1 else []
    try:
        torchrun(
            [
                *(place or ["--standalone"]),
                *("--nnodes", str(nodes)),
                *("--nproc-per-node", str(compute.processes)),
                *("--max-restarts", str(compute.restarts)),
                *("--shutdown-timeout", str(SHUTDOWN_S)),
                *("--module", "model.training.launch.worker", str(arguments.job)),
                *(["--end-with-input"] if arguments.end_with_input else []),
            ]
        )
    except SignalException as error:  # the workers have saved and ended
        return 128 + int(error.sigval)
    except ChildFailedError:  # torchrun has printed which one
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
