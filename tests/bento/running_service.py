"""A real `bentoml serve` of the source on a loopback port, for tests that need the whole process."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import PreTrainedTokenizerFast

from model.modeling_rex import RexForCausalLM
from tests.e2e.workplace import BIN, REPO, free_port, stop, wait_for
from tests.support.tiny import tiny_model, tiny_tokenizer

LONG_CONTEXT = 8192
GREEDY = {"prompt": "def main", "max_tokens": 8, "temperature": 0}
WITHOUT_KEYS = ("BENTOML", "REX_", "LLM_API", "OTEL_")


@dataclass
class Server:
    """A running service. process: BentoML's parent process; its one child serves."""

    process: subprocess.Popen
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def worker(self) -> psutil.Process:
        (child,) = [one for one in psutil.Process(self.process.pid).children() if "--fd" in one.cmdline()]
        return child

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def async_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits)

    def metrics(self) -> dict[str, float]:
        """Every line of /metrics, labels and all."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        rows = [row.rsplit(" ", 1) for row in text.splitlines() if not row.startswith("#")]
        return {name: float(value) for name, value in rows}

    def ask(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json={**GREEDY, **body}, timeout=60)

    def wait_until_ready(self, seconds: float = 300) -> None:
        wait_for(f"{self.url}/readyz", self.process, self.log_file, seconds)


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(WITHOUT_KEYS)}
    ours = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **variables}


def command(*options: str) -> list[str]:
    return [str(BIN / "bentoml"), "serve", "bento.service:RexService", "--working-dir", str(REPO), *options]


@contextmanager
def serve(folder: Path, model_dir: Path | None, *, is_ready: bool = True, **variables: str) -> Iterator[Server]:
    """Serve `model_dir`, or what the variables name; what is left of the processes is ended at the end."""
    port, log_file = free_port(), folder / "serve.log"
    with log_file.open("w") as out:
        process = subprocess.Popen(
            command("--host", "127.0.0.1", "--port", str(port)),
            cwd=folder,
            env=environment(folder, REX_MODEL=str(model_dir or ""), **variables),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log_file)
    try:
        if is_ready:
            server.wait_until_ready()
        yield server
    finally:
        if process.poll() is None:
            try:
                stop(process, seconds=30)
            except subprocess.TimeoutExpired:
                for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                    left.send_signal(signal.SIGKILL)


def save_long_model(directory: Path) -> tuple[RexForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model with room for thousands of tokens, as a directory and in memory."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=LONG_CONTEXT)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer
