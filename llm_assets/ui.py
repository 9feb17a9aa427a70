"""Starts the pages of Dagster and MLflow and ends them with all their processes: `make ui` runs this.

    python -m llm_assets.ui [--host 127.0.0.1] [--port 3001] [--mlflow-port 5000]

Prints two addresses once both answer; the servers' output goes to var/ui/. TERM, INT and HUP (a closed terminal) end
them, even if a script started this in the background, where INT is ignored. An active run gets time to save its state.
This process imports neither Dagster nor MLflow, each of which takes 100 MB or more.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from llm_assets.instance.dagster_home import check_dagster_home
from llm_assets.page_links import DAGSTER, MLFLOW, redirect_former
from llm_assets.paths import REPOSITORY, var_dir
from llm_assets.resources.provenance import DAGSTER_URL
from model.errors import PipelineError, ends_in_one_line

START_S, STOP_S = 180.0, 7.0
"""How long a server may take to answer, and to end before it is killed."""


class Server:
    """One server in a separate session, so that all its processes can be found and ended."""

    def __init__(self, name: str, url: str, command: Sequence[str], log: Path) -> None:
        self.name, self.url, self.log = name, url, log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Whether the server answers. Raises PipelineError if it has ended."""
        if self.process.poll() is not None:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"exit status {self.process.returncode}"
            raise PipelineError(f"{self.name} has ended: {reason} (see its output in {self.log})")
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(self.url, timeout=2):
            return True
        return False

    def members(self) -> list[psutil.Process]:
        """The processes of its session."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return found


def stop(servers: Sequence[Server]) -> None:
    """End every process of the servers: by SIGINT, and by SIGKILL after STOP_S."""
    members = [process for server in servers for process in server.members()]
    for server in servers:
        with suppress(ProcessLookupError):
            os.kill(server.process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(members, timeout=STOP_S)
    for process in {*alive, *(process for server in servers for process in server.members())}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for server in servers:
        server.process.wait()


class _Stopped(Exception):
    """A signal arrived that ends the servers."""


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives or a server ends."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.ui", description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=3001, help="port of Dagster's page, default: 3001")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="port of MLflow's page, default: 5000")
    given = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise_stopped)
    servers: list[Server] = []
    try:
        check_dagster_home()
        logs = var_dir() / "ui"
        logs.mkdir(parents=True, exist_ok=True)
        mlflow, dagster = (f"http://{given.host}:{port}" for port in (given.mlflow_port, given.port))
        os.environ.setdefault("MLFLOW_UI_URL", mlflow)
        os.environ.setdefault(DAGSTER_URL, dagster)
        # Without Dagster's warning that advises `dg`.
        command = [sys.executable, "-W", "ignore::FutureWarning", "-m", "dagster", "dev"]
        command += ["--workspace", str(REPOSITORY / "workspace.yaml")]
        command += ["--host", given.host, "--port", str(given.port)]
        servers.append(Server("Dagster", dagster, command, logs / "dagster.log"))
        command = [sys.executable, "-m", "llm_assets.instance.mlflow_server", given.host, str(given.mlflow_port)]
        servers.append(Server("MLflow", mlflow, command, logs / "mlflow.log"))
        started = time.monotonic()
        while not all(server.answers() for server in servers):
            if time.monotonic() - started > START_S:
                raise PipelineError(f"no answer within {START_S:.0f} s: see the servers' output in {logs}")
            time.sleep(0.2)
        redirect_former({DAGSTER: dagster, MLFLOW: mlflow})
        print(f"Dagster  {dagster}\nMLflow   {mlflow}", flush=True)
        while True:
            for server in servers:
                if server.process.poll() is not None:
                    server.answers()  # raises with its last line
            time.sleep(0.5)
    except _Stopped:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        stop(servers)


if __name__ == "__main__":
    sys.exit(main())
