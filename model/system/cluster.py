"""Ray, if `compute.engine` is ray: started with this process on this machine, or a cluster that is running.

    python -m model.system.cluster OWNER PROCESSES

starts a Ray, prints its address, and ends it with the process OWNER, for `run_ray.py`.

Ray is imported inside functions: everything else runs without it.
"""

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import model
from model.errors import PipelineError, TransientError, ends_in_one_line
from model.settings import ComputeSettings
from model.system.run_ray import ADDRESS, VARIABLE, is_alive, shared_address

_LOOK_EVERY_S = 0.5
STARTS = 3
"""Attempts to start a Ray: each gives up after 30 seconds, which a busy machine may take (ray 2.60)."""

KEEPALIVE_MS = {"RAY_grpc_client_keepalive_time_ms": 20_000, "RAY_grpc_client_keepalive_timeout_ms": 20_000}
"""After which silence Ray asks whether the other host of a call is there, and how long it waits for the answer. By
default these are 5 and 2 minutes: so long a step would wait for a task of a host that was cut off (407 s seen)."""


@contextmanager
def connected(compute: ComputeSettings) -> Iterator[Any]:
    """The module `ray`, connected to `compute.address`, to the Ray of this run, or to one that ends with the block.

    Raises PipelineError if Ray is not installed or no cluster answers, TransientError if a Ray does not start here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports to Ray's makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # not 15: the step waits for its tasks
    for name, milliseconds in KEEPALIVE_MS.items():
        os.environ.setdefault(name, str(milliseconds))
    if find_spec("ray") is None:
        raise PipelineError(
            "compute.engine is 'ray', and the package ray is not installed: run pip install '.[ray]', or choose "
            "compute=local"
        )
    shared = "" if compute.address else shared_address(compute.processes)
    if shared:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as its holder has it by default; read by the import
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": compute.address or shared}
    if not shared:
        paths = [str(Path(model.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if not options["address"]:
        # The dashboard would take 100 MB and some seconds. Without "local", Ray would join the cluster that
        # `ray start` or RAY_ADDRESS last named on this machine.
        options |= {"address": "local", "num_cpus": compute.processes, "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    attempts = STARTS
    try:
        while not ray.is_initialized():
            attempts -= 1
            try:
                ray.init(logging_level=logging.ERROR, **options)
            except Exception as error:
                ray.shutdown()
                # Not again at a wrong address; but a cluster that answers can fail to start this client's server.
                if not attempts or (compute.address and not isinstance(error, ConnectionAbortedError)):
                    raise
    except Exception as error:  # ConnectionError, RuntimeError, ValueError and Ray's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not compute.address:
            raise TransientError(
                f"Ray did not start on this machine ({reason}): run again when it is less busy, or choose "
                "compute=torchrun or compute=local"
            ) from error
        raise PipelineError(
            f"compute.address is {compute.address!r}: no Ray cluster answers there ({reason}); correct it, or leave it "
            "empty to start Ray on this machine"
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray's would end the process at once
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


@ends_in_one_line
def main() -> int:
    """Start a Ray, print its address, and end it with another process."""
    parser = argparse.ArgumentParser(prog="python -m model.system.cluster", description=main.__doc__)
    parser.add_argument("owner", type=int, help="id of the process with which the Ray ends")
    parser.add_argument("processes", type=int, help="cores of the Ray")
    arguments = parser.parse_args()
    file = os.environ.pop(VARIABLE, "").partition(":")[2]
    with connected(ComputeSettings(engine="ray", processes=arguments.processes)) as ray:
        print(f"{ADDRESS}{ray.get_runtime_context().gcs_address}", flush=True)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):  # the step reads no further
            os.dup2(silence, stream)
        while is_alive(arguments.owner):
            time.sleep(_LOOK_EVERY_S)
    if file:
        Path(f"{file}-{arguments.processes}").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
