"""Starts the pages of Dagster and MLflow and ends them with all their processes: `make ui` runs this.

    python -m llm_assets.ui [--host 127.0.0.1] [--port 3001] [--mlflow-port 5000]

Dagster's records are in DAGSTER_HOME, by default `dagster/` of the output folder, where `make` keeps them.
Prints two addresses once both answer; the servers' output goes to var/ui/. TERM, INT and HUP (a closed terminal, unless
`nohup` started this) end them, even if a script started this in the background, where INT is ignored. An active run has
time to save its state. A page whose server was killed is started again, and runs go on meanwhile.
This process imports neither Dagster nor MLflow, each of which takes 100 MB or more. All servers start at once, those of
Dagster with its own commands (`instance/started_after.py`).
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from llm_assets.instance.dagster_home import check_dagster_home
from llm_assets.page_links import DAGSTER, MLFLOW, redirect_former, release
from llm_assets.paths import REPOSITORY, output_folder, var_dir
from llm_assets.resources.provenance import DAGSTER_URL
from model.errors import PipelineError, ends_in_one_line

START_S, STOP_S = 180.0, 7.0
"""How long a server may take to answer, and to end before it is killed."""


class Server:
    """One server in a separate session, so that all its processes can be found and ended. url: of its page, if any."""

    def __init__(self, name: str, url: str, command: Sequence[str], log: Path) -> None:
        self.name, self.url, self.log = name, url, log
        self._command = command
        log.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        """Start its process, also in place of one that has ended."""
        self.has_answered = False
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Whether the server's page answers, if it has one. Raises PipelineError if the server has ended."""
        if self.process.poll() is not None:
            raise PipelineError(f"{self.name} has ended: {self.reason()} (see its output in {self.log})")
        if not self.url:
            return True
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(self.url, timeout=2):
            self.has_answered = True
        return self.has_answered

    def reason(self) -> str:
        """Why its process has ended: the signal, or the last line that it printed."""
        status = self.process.returncode
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit status {status}"

    def watch(self) -> None:
        """Start the server again if it has ended and its page had answered: runs do not need a page.

        Raises PipelineError for one that has ended without a page or before it answered.
        """
        if self.has_answered and self.process.poll() is not None:
            print(f"{self.name} has ended ({self.reason()}) and is started again", file=sys.stderr, flush=True)
            self.start()
        elif not self.has_answered:
            self.answers()

    def members(self) -> list[psutil.Process]:
        """The processes of its session."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return found


def stop(servers: Sequence[Server]) -> None:
    """End every process of the servers, runs included, as Ctrl-C in their terminal would; by SIGKILL after STOP_S."""
    members = [process for server in servers for process in server.members()]
    for process in members:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(members, timeout=STOP_S)
    for process in {*alive, *(process for server in servers for process in server.members())}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for server in servers:
        server.process.wait()


def code_locations(workspace: Path) -> dict[str, str]:
    """The module of each code location in a workspace file, by the location's name.

    Raises PipelineError for a location that is not a module.
    """
    found = {}
    for entry in yaml.safe_load(workspace.read_text(encoding="utf-8"))["load_from"]:
        module = entry.get("python_module") if isinstance(entry, dict) else None
        if isinstance(module, str):
            module = {"module_name": module}
        if not module:
            raise PipelineError(
                f"{workspace} lists {entry}: expected `python_module`; `dagster dev` starts other kinds"
            )
        found[module.get("location_name") or module["module_name"]] = module["module_name"]
    return found


def start_dagster(host: str, port: int, logs: Path, folder: Path) -> Iterator[Server]:
    """Start a server for each code location, the webserver and the daemon; sockets and a workspace go to `folder`.

    The daemon waits for the webserver, as the first process to open a new instance creates its tables.
    """
    dagster = [sys.executable, "-W", "ignore::FutureWarning", "-m"]
    sockets: dict[str, str] = {}
    for name, module in code_locations(REPOSITORY / "workspace.yaml").items():
        sockets[name] = str(folder / f"{len(sockets)}.sock")
        command = [*dagster, "dagster", "code-server", "start", "--module-name", module, "--socket", sockets[name]]
        command += ["--location-name", name, "--working-directory", str(REPOSITORY)]
        yield Server(f"Dagster's code location {name}", "", command, logs / f"{name}.log")
    workspace = folder / "workspace.yaml"
    entries = [{"grpc_server": {"location_name": name, "socket": path}} for name, path in sockets.items()]
    workspace.write_text(yaml.safe_dump({"load_from": entries}))
    after = [*dagster, "llm_assets.instance.started_after"]
    command = [*after, ",".join(sockets.values()), "llm_assets.instance.webserver:main", "--workspace", str(workspace)]
    yield Server(
        "Dagster", f"http://{host}:{port}", [*command, "--host", host, "--port", str(port)], logs / "dagster.log"
    )
    command = [*after, f"{host}:{port}", "dagster-daemon", "run", "--workspace", str(workspace)]
    yield Server("Dagster's daemon", "", command, logs / "daemon.log")


def usable_port(host: str, text: str, page: str, variable: str) -> int:
    """The port that `text` gives for a page; links of another checkout that are redirected there give way.

    Raises PipelineError if it is not a port, or no server can listen there.
    """
    port = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < port < 1 << 16:
        raise PipelineError(f"{variable}={text}: expected a port from 1 to 65535 for {page}'s page")
    try:
        try:
            _bind(host, port)
        except OSError:
            if not release(port):
                raise
            _bind(host, port)
    except OSError as error:
        raise PipelineError(
            f"{page} cannot listen at {host}:{port} ({error.strerror}): end the server that has it, or choose another: "
            f"make ui {variable}={port + 10 if port < 65000 else 3011}"
        ) from error
    return port


def _bind(host: str, port: int) -> None:
    """Raise OSError if no server can listen there."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    with socket.socket(found[0][0]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(found[0][4])


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def has_terminal() -> bool:
    """Whether this process has a terminal that is not closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError:
        return False
    return True


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives or a server ends that cannot be started again."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.ui", description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, default: 127.0.0.1")
    parser.add_argument("--port", default="3001", help="port of Dagster's page, default: 3001")
    parser.add_argument("--mlflow-port", default="5000", help="port of MLflow's page, default: 5000")
    given = parser.parse_args(argv)
    # Only noted: a closed terminal sends several signals, and one that raised would cut short what ends the servers.
    received: list[int] = []
    kept_by_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    ending = [number for number in ENDING if not (number == signal.SIGHUP and kept_by_nohup)]
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in ending}
    # Closing the terminal of `ssh -t HOST make ui` sends a signal to make alone, which waits for this process.
    parent_leads = not kept_by_nohup and os.getsid(0) == os.getppid() and has_terminal()

    def is_over() -> bool:
        return bool(received) or (parent_leads and not has_terminal())

    servers: list[Server] = []
    folder = tempfile.TemporaryDirectory(prefix="rex-ui-")  # a socket's path has at most 107 bytes
    try:
        home = Path(os.environ.setdefault("DAGSTER_HOME", str(var_dir() / "dagster")))
        check_dagster_home()
        if not (home / "dagster.yaml").exists():
            shutil.copyfile(REPOSITORY / "dagster.yaml", home / "dagster.yaml")
        port = usable_port(given.host, given.port, "Dagster", "UI_PORT")
        mlflow_port = usable_port(given.host, given.mlflow_port, "MLflow", "MLFLOW_PORT")
        if port == mlflow_port:
            raise PipelineError(f"both pages have port {port}: expected two ports, UI_PORT and MLFLOW_PORT")
        logs = output_folder("ui")
        mlflow, dagster = (f"http://{given.host}:{number}" for number in (mlflow_port, port))
        os.environ.setdefault("MLFLOW_UI_URL", mlflow)
        os.environ.setdefault(DAGSTER_URL, dagster)
        servers.extend(start_dagster(given.host, port, logs, Path(folder.name)))
        command = [sys.executable, "-m", "llm_assets.instance.mlflow_server", given.host, str(mlflow_port)]
        servers.append(Server("MLflow", mlflow, command, logs / "mlflow.log"))
        started = time.monotonic()
        while not is_over() and not all(server.answers() for server in servers):
            if time.monotonic() - started > START_S:
                raise PipelineError(f"no answer within {START_S:.0f} s: see the servers' output in {logs}")
            time.sleep(0.2)
        if not is_over():
            redirect_former({DAGSTER: dagster, MLFLOW: mlflow})
            print(f"Dagster  {dagster}\nMLflow   {mlflow}", flush=True)
        while not is_over():
            for server in servers:
                server.watch()
            time.sleep(0.5)
        return 0
    finally:
        stop(servers)
        folder.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
