"""The cost of a new champion for running requests: a real MLflow server, a real service, a steady load.

    python -m bench.rollover [MODEL_DIR] [--clients 4] [--tokens 64] [--seconds 10] [--promotions 3]

Clients stream one answer after the other, each from a new prompt. Meanwhile new versions of the model are registered
and promoted to champion: for each, the service downloads, checks, loads, warms up and switches to the new version and
frees the previous one. For the requests that began before a promotion and those in flight during one, the table has the
count, the failures (a status other than 200, or an incomplete stream), and the median and 99th percentile of the
seconds to the first and the last token. Without a directory it makes a model of the shape of `stdlib_30m` with random
weights. Prints a table and JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.server import HOST, Answer, Server, free_port, run_bench, serve
from bench.serving import PROMPT_TOKENS, Prompts, save_random_30m
from model.artifact import MANIFEST, file_digests
from model.errors import PipelineError
from model.weights.loading import read_config

NAME = "rex-bench"
AFTER_S = 2.0
"""After the switch to the new version: freeing the previous one is part of the cost."""


class RegisteredModel:
    """A registered model on a tracking server, over MLflow's REST API."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._experiment = self._call("POST", "experiments/create", {"name": NAME})["experiment_id"]
        self._call("POST", "registered-models/create", {"name": NAME})

    def promote(self, model_dir: Path) -> str:
        """Register a directory and promote it to champion; returns its version."""
        run = self._call("POST", "runs/create", {"experiment_id": self._experiment})["run"]["info"]
        source = f"{run['artifact_uri']}/model"
        folder = source.partition(":")[2].strip("/")
        for name in [*file_digests(model_dir), MANIFEST]:
            path = f"/api/2.0/mlflow-artifacts/artifacts/{quote(folder)}/{quote(name)}"
            self._send("PUT", path, (model_dir / name).read_bytes(), "application/octet-stream")
        made = {"name": NAME, "source": source, "run_id": run["run_id"]}
        version: str = self._call("POST", "model-versions/create", made)["model_version"]["version"]
        self._call("POST", "registered-models/alias", {"name": NAME, "alias": "champion", "version": version})
        return version

    def _call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        answer = self._send(method, f"/api/2.0/mlflow/{path}", json.dumps(body).encode(), "application/json")
        return json.loads(answer)

    def _send(self, method: str, path: str, body: bytes, kind: str) -> bytes:
        headers = {"Content-Type": kind}
        request = urllib.request.Request(self._address + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            read: bytes = answer.read()
        return read


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """The address of an MLflow server with its state below `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = folder / "mlflow.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not _answers(f"http://{HOST}:{port}/health"):
            if process.poll() is not None:
                raise PipelineError(f"the MLflow server did not start: {log.read_text()[-1000:]}")
            time.sleep(0.1)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Sent:
    """Start time, end time and outcome of a request."""

    began: float
    ended: float
    answer: Answer

    @property
    def failed(self) -> bool:
        """Whether a client would have had to retry."""
        return self.answer.status != 200 or not self.answer.is_whole


class Load:
    """Closed-loop clients: each sends its next request as soon as it is answered."""

    def __init__(self, server: Server, prompts: Prompts, clients: int, tokens: int) -> None:
        self._server, self._prompts, self._tokens = server, prompts, tokens
        self.sent: list[Sent] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_again) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each client finish its current request."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask_again(self) -> None:
        while not self._is_over.is_set():
            began = time.perf_counter()
            try:
                answer = self._server.ask(self._prompts(PROMPT_TOKENS), self._tokens)
            except OSError:
                answer = Answer()
            self.sent.append(Sent(began, time.perf_counter(), answer))


def measure(model_dir: Path, *, clients: int, tokens: int, seconds: float, promotions: int) -> dict[str, Any]:
    """Measure and print the table and the JSON line."""
    prompts = Prompts(read_config(model_dir).vocab_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sealed = Path(shutil.copytree(model_dir, folder / "model"))
        (sealed / MANIFEST).unlink(missing_ok=True)
        (sealed / MANIFEST).write_text(json.dumps({"files": file_digests(sealed)}))
        with tracking_server(folder) as address:
            registered = RegisteredModel(address)
            variables = {"REX_CHAMPION": NAME, "MLFLOW_TRACKING_URI": address, "REX_CHAMPION_POLL_S": "1"}
            with serve(sealed, folder, **variables) as server:
                load = Load(server, prompts, clients, tokens)
                windows = []
                try:
                    time.sleep(seconds)
                    for _ in range(promotions):
                        began = time.perf_counter()
                        version = registered.promote(sealed)
                        while _version(server) != version:
                            time.sleep(0.05)
                        windows.append((began, time.perf_counter() + AFTER_S))
                        time.sleep(AFTER_S + seconds)
                finally:
                    load.stop()
    first = windows[0][0]
    during = [one for one in load.sent if any(one.began < end and one.ended > began for began, end in windows)]
    before = [one for one in load.sent if one.ended <= first]
    took = [end - began - AFTER_S for began, end in windows]
    return {
        "before": summary(before),
        "during": summary(during),
        "all": summary(load.sent),
        "rollover_s": round(statistics.median(took), 1),
    }


def summary(sent: list[Sent]) -> dict[str, Any]:
    """Statistics of a group of requests."""
    good = [one.answer for one in sent if not one.failed]
    return {
        "requests": len(sent),
        "failed": sum(one.failed for one in sent),
        "first_token_ms": _percentiles([1000 * answer.first_s for answer in good]),
        "total_ms": _percentiles([1000 * answer.total_s for answer in good]),
    }


def _percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values or [float("nan")])[0], (values or [float("nan")])[0]
    return round(statistics.median(values), 1), round(statistics.quantiles(values, n=100)[98], 1)


def table(result: dict[str, Any]) -> str:
    """Print one row per group of requests."""
    rows = [f"{'requests':>28} {'failed':>7} {'first token p50, p99 ms':>26} {'last token p50, p99 ms':>26}"]
    for group in ("before", "during", "all"):
        found = result[group]
        first, total = ("{:,.0f}, {:,.0f}".format(*found[name]) for name in ("first_token_ms", "total_ms"))
        rows.append(f"{group:18} {found['requests']:>9} {found['failed']:>7} {first:>26} {total:>26}")
    return "\n".join([*rows, f"promotion to serving: {result['rollover_s']} s, median"])


def _version(server: Server) -> str | None:
    with urllib.request.urlopen(f"http://{HOST}:{server.port}/v1/models", timeout=60) as answer:
        version: str | None = json.load(answer)["data"][0]["version"]
    return version


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def main() -> None:
    """Measure and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4, help="closed-loop clients")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="load before the first promotion and after each")
    parser.add_argument("--promotions", type=int, default=3)
    run_bench(parser, save_random_30m, measure, table)


if __name__ == "__main__":
    main()
