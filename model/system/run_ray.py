"""One embedded Ray for all steps of a run: the first step that needs it starts it, and it ends with the run.

    python -m model.system.run_ray OWNER PROCESSES

starts a Ray, prints its address, and ends it with the process OWNER. Steps are processes that come and go, so this one
holds the Ray. A step of no such run starts its own Ray, in its own process (`cluster.py`).
"""

import argparse
import fcntl
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from model.errors import TransientError, ends_in_one_line
from model.settings import ComputeSettings

VARIABLE = "REX_RUN_RAY"
"""OWNER:FILE, in the environment of a run's steps. FILE-PROCESSES has the id of the process that holds the Ray, and its
address."""
_LOOK_EVERY_S = 0.5
_ADDRESS = "address "


def share_in_this_process_tree() -> None:
    """Let processes that this one starts share a Ray that ends with this one."""
    file = Path(tempfile.gettempdir(), f"rex-ray-{secrets.token_hex(16)}")  # a name that others cannot put a file at
    os.environ[VARIABLE] = f"{os.getpid()}:{file}"


def shared_address(processes: int) -> str:
    """The address of this run's Ray, which has `processes` cores and starts unless it runs; empty outside of a run.

    Raises TransientError if it does not start.
    """
    owner, _, file = os.environ.get(VARIABLE, "").partition(":")
    if not owner or not _lives(int(owner)):
        return ""
    # Steps of another run, forked from the same server, may need another number of cores.
    with os.fdopen(os.open(f"{file}-{processes}", os.O_RDWR | os.O_CREAT, 0o600), "r+") as found:
        fcntl.flock(found, fcntl.LOCK_EX)  # of two steps at once, one starts it
        holder, _, address = found.read().partition(" ")
        if not holder or not _lives(int(holder)):
            holder, address = _start(owner, processes)
            found.seek(0)
            found.truncate()
            found.write(f"{holder} {address}")
        return address


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(owner: str, processes: int) -> tuple[str, str]:
    """Process id and address."""
    command = [sys.executable, "-m", "model.system.run_ray", owner, str(processes)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A new session: Ctrl-C reaches the steps, which may need the Ray while they save.
    holder = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Ray's workers inherit the path. Those that start before there is work would be the holder's, which has none.
        env={**os.environ, "PYTHONPATH": path, "RAY_prestart_worker_first_driver": "0"},
        cwd=root,
    )
    printed = ""
    try:
        assert holder.stdout is not None
        with holder.stdout as lines:
            for line in lines:
                if line.startswith(_ADDRESS):
                    return str(holder.pid), line.removeprefix(_ADDRESS).strip()
                printed = line.strip() or printed
    except BaseException:
        holder.kill()
        raise
    raise TransientError(printed.removeprefix("error: "))


@ends_in_one_line
def main() -> int:
    """Hold a Ray until the owner has ended."""
    from model.system.cluster import connected

    parser = argparse.ArgumentParser(prog="python -m model.system.run_ray", description=__doc__.split("\n")[0])
    parser.add_argument("owner", type=int, help="id of the process with which the Ray ends")
    parser.add_argument("processes", type=int, help="cores of the Ray")
    arguments = parser.parse_args()
    file = os.environ.pop(VARIABLE, "").partition(":")[2]
    with connected(ComputeSettings(engine="ray", processes=arguments.processes)) as ray:
        print(f"{_ADDRESS}{ray.get_runtime_context().gcs_address}", flush=True)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):  # the step reads no further
            os.dup2(silence, stream)
        while _lives(arguments.owner):
            time.sleep(_LOOK_EVERY_S)
    if file:
        Path(f"{file}-{arguments.processes}").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
