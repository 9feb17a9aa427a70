"""Real processes for the end-to-end tests: the Dagster CLI, the BentoML server, each with separate state."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass
class Workplace:
    """A user's state, apart from every other test's: artifacts, MLflow, Dagster and the BentoML store.

    variables: of the environment, besides those that name this state.
    """

    root: Path
    bentoml: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def var(self) -> Path:
        return self.root / "var"

    @property
    def env(self) -> dict[str, str]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("DAGSTER", "MLFLOW", "BENTOML", "OMP_", "REX_"))
        }
        return {
            **inherited,
            "LLM_ASSETS_VAR": str(self.var),
            "DAGSTER_HOME": str(self.root / "dagster"),
            "BENTOML_HOME": str(self.bentoml),
            "BENTOML_DO_NOT_TRACK": "True",
            "OMP_NUM_THREADS": "1",  # the other core is another test's
            "PYTHONUNBUFFERED": "1",
            **self.variables,
        }

    def run(self, *command: str, folder: Path = REPO, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands, or a path's, as a user would; stdout and stderr come together."""
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def make(self, *arguments: str) -> list[str]:
        """The command that runs a make target with this environment and state, in the repository."""
        here = [f"BIN={BIN}", f"DAGSTER_HOME={self.root / 'dagster'}"]
        return ["make", "--no-print-directory", "--old-file=.venv/.installed", *arguments, *here]

    def latest(self, asset: str, experiment: str = "smoke") -> Path:
        """The directory of the newest artifact."""
        folder = self.var / "artifacts" / asset / experiment
        return folder / (folder / "LATEST").read_text().strip()

    def manifest(self, asset: str, experiment: str = "smoke") -> dict:
        return json.loads((self.latest(asset, experiment) / "manifest.json").read_text())


_COMMAND_LINE = """
import json, sys, traceback
from dagster._cli import create_dagster_cli
dagster = create_dagster_cli()
for line in sys.stdin:
    status = 0
    try:
        dagster.main(json.loads(line), prog_name="dagster")
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    print(f"\\n{sys.argv[1]}{status}", flush=True)
"""
_ENDED = "the command has ended: "


class CommandLine:
    """Dagster's command line in one process, which imports it once and forks the steps of all runs from one server."""

    def __init__(self, workplace: Workplace) -> None:
        self._process = subprocess.Popen(
            [str(BIN / "python"), "-W", "ignore", "-c", _COMMAND_LINE, _ENDED],
            cwd=REPO,
            env=workplace.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `dagster` with these arguments; stdout and stderr come together."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(_ENDED):
                status = line.removeprefix(_ENDED).strip()
                return subprocess.CompletedProcess(arguments, int(status) if status.isdigit() else 1, "".join(lines))
            lines.append(line)
        return pytest.fail("".join(lines)[-3000:])

    def close(self) -> None:
        """End the process and, with it, the server of its steps."""
        self._process.communicate()


def new_workplace(root: Path) -> Workplace:
    (root / "dagster").mkdir(parents=True)
    (root / "dagster" / "dagster.yaml").write_bytes((REPO / "dagster.yaml").read_bytes())
    return Workplace(root, root / "bentoml")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    """Wait until `url` answers 200; fail with the process's log if it ends or never answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} before {url} answered:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"{url} did not answer within {seconds} s:\n{log.read_text()[-3000:]}")


@contextmanager
def started(command: list[str], workplace: Workplace, url: str, log: Path, folder: Path = REPO) -> Iterator[None]:
    """A server, once `url` answers; then it and its processes are told to end."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=workplace.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(url, process, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(120)


def stop(process: subprocess.Popen, sig: int = signal.SIGTERM, seconds: float = 120) -> int:
    """Send a signal to a process that the test started and return its exit status."""
    process.send_signal(sig)
    return process.wait(seconds)
