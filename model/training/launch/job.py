"""The job of a training in several processes: its files in the scratch folder, and where its hosts meet.

Imports no torch, so that the agent, which only starts processes, is quick.
"""

import os

from model.errors import PipelineError
from model.settings import ComputeSettings
from model.system.cpu import usable_cores
from model.system.lifeline import GRACE_S

JOB, REPORTS, PRESENCE = "job.json", "reports", "processes.lock"
"""In the scratch folder: what to train, a file of JSON lines for each rank, and the lock that every process holds."""
SHUTDOWN_S = round(GRACE_S) - 10
"""Time that torchrun gives its workers to save; the process that started it waits a little longer."""


def rendezvous(compute: ComputeSettings) -> tuple[int, str]:
    """Number of hosts, and HOST:PORT where they meet: "" for one host.

    Raises PipelineError for several hosts without such an address, and for a variable that is not a number.
    """
    nodes = compute.nodes or int(_from_environment("compute.nodes", "SLURM_NNODES", "PET_NNODES") or 1)
    if nodes == 1:
        return 1, ""
    endpoint = compute.endpoint
    if not endpoint and (host := os.environ.get("MASTER_ADDR")):
        endpoint = f"{host}:{_from_environment('compute.endpoint', 'MASTER_PORT') or 29400}"
    if not endpoint:
        raise PipelineError(
            f"compute.nodes is {nodes} and compute.endpoint is empty: expected HOST:PORT on one of the hosts, or "
            "MASTER_ADDR and MASTER_PORT in the environment"
        )
    return nodes, endpoint


def _from_environment(option: str, *names: str) -> str:
    """The first of these variables that is set, a number; empty if none is."""
    for name in names:
        if value := os.environ.get(name, "").strip():
            if not value.isdigit() or not int(value):
                raise PipelineError(f"{name} is {value!r}: expected a number for {option}; set the option itself")
            return value
    return ""


def worker_environment(processes: int) -> dict[str, str]:
    """Environment of torchrun: threads of each process, and a rendezvous that restarts survive."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // processes)),
        # Restarted workers would read the addresses of the dead ones from a store that the agent keeps (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
