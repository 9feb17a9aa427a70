"""One embedded Ray for all steps of a run: the first step that needs it starts it, and it ends with the run.

Steps are processes that come and go, so a process of `cluster.py` holds the Ray. A step of no such run starts its own
Ray, in its own process.
"""

import fcntl
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from model.errors import TransientError

VARIABLE = "REX_RUN_RAY"
"""OWNER:FILE, in the environment of a run's steps. FILE-PROCESSES has the id of the process that holds the Ray, and its
address."""
ADDRESS = "address "
"""Begins the line that the holder prints."""


def share_in_this_process_tree() -> None:
    """Let processes that this one starts share a Ray that ends with this one."""
    file = Path(tempfile.gettempdir(), f"rex-ray-{secrets.token_hex(16)}")  # a name that others cannot put a file at
    os.environ[VARIABLE] = f"{os.getpid()}:{file}"


def shared_address(processes: int) -> str:
    """The address of this run's Ray, which has `processes` cores and starts unless it runs; empty outside of a run.

    Raises TransientError if it does not start.
    """
    owner, _, file = os.environ.get(VARIABLE, "").partition(":")
    if not owner or not is_alive(int(owner)):
        return ""
    # Steps of another run, forked from the same server, may need another number of cores.
    with os.fdopen(os.open(f"{file}-{processes}", os.O_RDWR | os.O_CREAT, 0o600), "r+") as found:
        fcntl.flock(found, fcntl.LOCK_EX)  # of two steps at once, one starts it
        holder, _, address = found.read().partition(" ")
        if not holder or not is_alive(int(holder)):
            holder, address = _start(owner, processes)
            found.seek(0)
            found.truncate()
            found.write(f"{holder} {address}")
        return address


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(owner: str, processes: int) -> tuple[str, str]:
    """Process id and address."""
    command = [sys.executable, "-m", "model.system.cluster", owner, str(processes)]
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
                if line.startswith(ADDRESS):
                    return str(holder.pid), line.removeprefix(ADDRESS).strip()
                printed = line.strip() or printed
    except BaseException:
        holder.kill()
        raise
    raise TransientError(printed.removeprefix("error: "))
