"""A real `bentoml serve` of this checkout on the loopback address, and a client with negligible CPU cost.

The client reads raw sockets: parsing a stream would cost more CPU time than serving it.
"""

import argparse
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from model.errors import PipelineError
from model.system.commands import ending_with_parent

HOST = "127.0.0.1"
CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass
class Answer:
    """One request to the server: its status, number of text events, and seconds to the first event and to the end.

    is_whole: the stream was complete.
    """

    status: int = 0
    is_whole: bool = False
    retry_after: bool = False
    events: int = 0
    first_s: float = 0.0
    total_s: float = 0.0


@dataclass
class Server:
    """A running `bentoml serve`; start_s, start_cpu_s: seconds and CPU seconds from the command to ready.

    model: named in each request, which a gateway needs.
    """

    port: int
    process: subprocess.Popen
    start_s: float
    start_cpu_s: float = 0.0
    model: str | None = None

    def ask(self, prompt: Sequence[int] | str, answer_tokens: int) -> Answer:
        """Stream one completion of token ids or of a text."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "max_tokens": answer_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        answer, received = Answer(), bytearray()
        started = time.perf_counter()
        with socket.create_connection((HOST, self.port), timeout=600) as connection:
            connection.sendall(head.encode() + body)
            while chunk := connection.recv(1 << 16):
                received += chunk
                if not answer.first_s and b"data: " in received:
                    answer.first_s = time.perf_counter() - started
        answer.total_s = time.perf_counter() - started
        answer.status = int(received[9:12] or 0)
        answer.retry_after = b"\r\nretry-after: " in received.lower()
        answer.is_whole = b"data: [DONE]" in received[-64:]
        answer.events = received.count(b"data: ") - 1  # [DONE]
        return answer

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds used by the event loop's thread and by the whole worker."""
        worker = self.worker()
        used = {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}
        return used[worker.pid], sum(used.values())

    def worker(self) -> psutil.Process:
        """The worker process."""
        (worker,) = [one for one in psutil.Process(self.process.pid).children() if "--fd" in one.cmdline()]
        return worker


@contextmanager
def serve(model_dir: Path, folder: Path, **variables: str) -> Iterator[Server]:
    """Run the service from this checkout with the environment's options (REX_...) and `variables`; stop it on exit."""
    port = free_port()
    environment = {**os.environ, "REX_MODEL": str(model_dir.absolute()), "BENTOML_DO_NOT_TRACK": "True", **variables}
    environment.setdefault("BENTOML_HOME", str(folder / "bentoml"))
    log = folder / "serve.log"
    command = [str(Path(sys.executable).parent / "bentoml"), "serve", "bento.service:RexService"]
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            ending_with_parent(
                [*command, "--working-dir", str(CHECKOUT), "--host", HOST, "--port", str(port)], signal="TERM"
            ),
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        while not is_ready(port):
            if process.poll() is not None or time.perf_counter() - started > 300:
                raise PipelineError(f"the service did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        server = Server(port, process, time.perf_counter() - started)
        server.start_cpu_s = sum(sum(one.cpu_times()[:2]) for one in (psutil.Process(process.pid), server.worker()))
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def run_bench(
    parser: argparse.ArgumentParser,
    make_model: Callable[[Path], Path],
    measure: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Parse the command line, measure, print the table and a JSON line, and return the result.

    parser: its options are keyword arguments of `measure`. make_model: creates a model in a folder if the command line
    names none.
    """
    parser.add_argument("model_dir", type=Path, nargs="?")
    options = vars(parser.parse_args())
    model_dir = options.pop("model_dir")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model_dir = model_dir or make_model(Path(folder))
            # A full collection over what torch and transformers imported stops this process, the client, for 0.2 s.
            gc.collect()
            gc.freeze()
            result = measure(model_dir, **options)
        except PipelineError as error:
            sys.exit(f"error: {error}")
    print(table(result))
    print(json.dumps(result))
    return result


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def is_ready(port: int, path: str = "/readyz") -> bool:
    """Whether a server answers a GET with 200."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
