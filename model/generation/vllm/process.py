"""The process that runs vLLM: started, asked one step at a time, and ended. `worker.py` is what it runs."""

import json
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

from model.errors import PipelineError
from model.system.failure import reason_of

logger = logging.getLogger(__name__)
WORKER = "model.generation.vllm.worker"
KEPT_LINES = 200
"""Lines of its standard error that are kept for the reason of a failure."""
END_S = 10.0


class VllmProcess:
    """A vLLM engine for one model directory; all methods but `close` are called from one thread at a time.

    python: the interpreter of the environment that has vLLM. options: vLLM's EngineArgs. variables: of its environment.
    """

    name = "vllm"

    def __init__(
        self,
        python: Path,
        model_dir: Path,
        options: Mapping[str, Any],
        *,
        variables: Mapping[str, str],
        precision: str,
        bytes_per_token: int,
        worker: str = WORKER,
    ) -> None:
        self.precision, self.bytes_per_token = precision, bytes_per_token
        self.device = ""
        """"cpu" or "cuda", once it runs."""
        self.cache_tokens = 0
        """Tokens whose keys and values it has room for, once it runs."""
        self._python, self._model_dir, self._worker = python, model_dir, worker
        self._options, self._variables = dict(options), dict(variables)
        self._process: subprocess.Popen[str] | None = None
        self._stderr: deque[str] = deque(maxlen=KEPT_LINES)
        self._reader: Thread | None = None

    @property
    def pid(self) -> int | None:
        """Its id, None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it and wait until the model is loaded. Raises PipelineError with vLLM's reason."""
        # That environment has its own packages.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self._python), "-m", self._worker, str(self._model_dir), json.dumps(self._options)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[3],
                env={**inherited, **self._variables},
                start_new_session=True,  # a Ctrl-C in the terminal ends the service, which drains first
            )
        except OSError as error:
            raise PipelineError(f"vLLM cannot start: {error}; name the interpreter that has it") from None
        assert self._process.stderr
        self._reader = Thread(target=self._relay, args=(self._process.stderr,), name="vllm-log", daemon=True)
        self._reader.start()
        try:
            ready = self._answer()
        except RuntimeError as error:
            raise PipelineError(f"vLLM cannot run {self._model_dir}: {error}") from None
        self.device, self.cache_tokens = ready["device"], ready["cache_tokens"]
        logger.info("vLLM %s on %s: process %d", ready["release"], self.device, self._process.pid)

    def exchange(self, add: Mapping[str, Any], abort: list[str], masks: Mapping[str, str]) -> dict[str, Any]:
        """Pass requests on, compute one step, and return its outputs.

        add: new requests, by number. abort: numbers of those to end. masks: which tokens constrained ones may take
        next. Raises RuntimeError if the process has ended.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("vLLM does not run")
        try:
            process.stdin.write(json.dumps({"add": dict(add), "abort": abort, "masks": dict(masks)}) + "\n")
            process.stdin.flush()
        except (OSError, ValueError):
            raise RuntimeError(self._reason()) from None
        return self._answer()

    def renewed(self) -> "VllmProcess":
        """The same engine, not started; ends this one, which may hang."""
        self.close(wait_s=0.0)
        return VllmProcess(
            self._python,
            self._model_dir,
            self._options,
            variables=self._variables,
            precision=self.precision,
            bytes_per_token=self.bytes_per_token,
            worker=self._worker,
        )

    def close(self, wait_s: float = END_S) -> None:
        """End the process: its input ends, and after `wait_s` it is killed. Idempotent, from any thread."""
        process = self._process
        if process is None:
            return
        if wait_s and process.stdin:
            try:
                process.stdin.close()
                process.wait(wait_s)
            except (OSError, subprocess.TimeoutExpired):
                logger.warning("vLLM's process %d does not end: it is killed", process.pid)
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise RuntimeError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        assert self._process and self._reader
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "its process closed the pipe"
        self._reader.join(END_S)
        return reason_of("\n".join(self._stderr), status)

    def _relay(self, stream: IO[str]) -> None:
        for line in stream:
            self._stderr.append(line.rstrip())
            logger.debug("%s", line.rstrip())
