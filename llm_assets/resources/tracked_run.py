"""One open MLflow run; a background thread sends the entries that a stage logs.

A training must not wait for its tracking server. Entries go into a queue; the thread sends them in order and retries
while the server does not answer. Entries that are still unsent at the end of the run are saved to a file below var/;
the next run that reaches the server sends them (`send_unsent`).
"""

import json
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from llm_assets.resources.tracking_store import one_line
from llm_assets.versions.promotion import NO_CONTEST, Contest, decision_of
from llm_assets.versions.register import add_measurements, find_decision, register_version
from model.progress import Log, silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BATCH = 100  # MLflow's limit for the number of parameters in one call
_VALUE_CHARACTERS = 6000  # MLflow's limit for the length of a parameter
RETRY_EVERY_S = 5.0
FINAL_WAIT_S = 15.0
"""Longest wait at the end of a run for a server that does not answer."""
SYSTEM_EVERY_S = 10.0
"""Shortest time between two samples of the machine's load."""
_PERMANENT = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


def system_metrics() -> dict[str, float]:
    """Load of the machine under the names of MLflow's page of system metrics; a GPU's memory where torch uses one."""
    import psutil

    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(device)
            found[f"system/gpu_{device}_memory_usage_megabytes"] = (total - free) / 1e6
            found[f"system/gpu_{device}_memory_usage_percentage"] = 100 * (total - free) / total
    return found


def send(client: "MlflowClient", run_id: str, entry: Mapping[str, Any]) -> None:
    """Send one entry of the queue or of a file of unsent entries."""
    from mlflow.entities import Dataset, DatasetInput, Metric, Param

    match entry["kind"]:
        case "metrics":
            client.log_batch(run_id, metrics=[Metric(*metric) for metric in entry["values"]])
        case "params":
            client.log_batch(run_id, params=[Param(*param) for param in entry["values"]])
        case "inputs":
            client.log_inputs(run_id, [DatasetInput(Dataset(**dataset)) for dataset in entry["values"]])
        case "file":
            client.log_artifact(run_id, entry["path"], entry["folder"])
        case "folder":
            client.log_artifacts(run_id, entry["path"], entry["folder"])
        case "status":
            client.set_terminated(run_id, entry["status"], entry["time"])


def send_unsent(client: "MlflowClient", folder: Path, log: Log) -> None:
    """Send and delete the backlog of earlier runs; failing entries stay for the next run."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            for line in path.read_text().splitlines():
                _send_or_drop(client, path.stem, json.loads(line), log)
        except Exception as error:  # noqa: BLE001 - a tracking store may raise anything
            log(f"MLflow did not accept the entries in {path}: {one_line(error)}")
            return
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        log(f"sent to MLflow the entries that run {path.stem} logged while the server was unreachable")


def _send_or_drop(client: "MlflowClient", run_id: str, entry: Mapping[str, Any], warn: Log) -> None:
    """Send an entry; drop it with a warning if the store rejects it permanently. Raises other errors, for a retry."""
    from mlflow.exceptions import MlflowException

    try:
        send(client, run_id, entry)
    except MlflowException as error:
        if error.error_code not in _PERMANENT:
            raise
        warn(f"MLflow did not accept the {entry['name']}: {one_line(error)}")
    except FileNotFoundError as error:
        warn(f"MLflow did not get the {entry['name']}: {one_line(error)}")


def _copied(source: Path, folder: Path) -> Path:
    """A copy of a file or a folder inside `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / source.name
    shutil.copytree(source, copy, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, copy)
    return copy


class TrackedRun:
    """An open MLflow run. Once it is open, a failure to log is a warning: tracking must not end a training.

    unsent: folder for entries that cannot be sent. Calls of this object log the background thread's messages.
    """

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        url: str,
        warn: Log,
        unsent: Path | None = None,
        log: Log = silent,
    ) -> None:
        self._client, self._warn, self._log, self._unsent = client, warn, log, unsent
        self.run_id, self.url, self.failed = run_id, url, False
        self._ended = False
        self._last_step = self._system_samples = 0
        self._last_system = -SYSTEM_EVERY_S
        system_metrics()  # psutil's load is that since the last call
        self._queue: deque[dict[str, Any]] = deque()
        self._messages: deque[str] = deque()
        self._changed = threading.Condition()
        self._is_failing = self._is_closed = False
        self._thread: threading.Thread | None = None

    def end_after(self, error: BaseException | None) -> None:
        """End the run, the first time this is called: KILLED after a termination, FAILED after another error."""
        if self._ended:
            return
        self._ended = True
        status = "FAILED" if error or self.failed else "FINISHED"
        if isinstance(error, dg.DagsterExecutionInterruptedError | KeyboardInterrupt):
            status = "KILLED"
        self._put(kind="status", name=f"status {status}", status=status, time=int(time.time() * 1000))
        self.close()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at `step`, and now and then how busy the machine is."""
        self._last_step = max(self._last_step, step)
        now = int(time.time() * 1000)
        values = [[name, float(value), now, step] for name, value in metrics.items()]
        if time.monotonic() - self._last_system >= SYSTEM_EVERY_S:
            self._last_system = time.monotonic()
            values += [[name, value, now, self._system_samples] for name, value in system_metrics().items()]
            self._system_samples += 1
        self._put(kind="metrics", name="metrics", values=values)

    def log_final_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log results at the last step, so that they are a run's latest values and end its curves."""
        self.log_metrics(metrics, self._last_step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters; long values are cut to MLflow's limit."""
        values = [[name, str(value)[:_VALUE_CHARACTERS]] for name, value in params.items()]
        for start in range(0, len(values), _BATCH):
            self._put(kind="params", name="parameters", values=values[start : start + _BATCH])

    def log_inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the datasets that the run reads: name, digest, source_type and source of each."""
        self._put(kind="inputs", name="datasets", values=[dict(dataset) for dataset in datasets])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content; it must exist until the run has ended."""
        self._put(kind="folder" if path.is_dir() else "file", name=path.name, path=str(path), folder=folder)

    def register(
        self,
        name: str,
        model_dir: Path,
        *,
        asset: str,
        bits_per_byte: float,
        evaluation_text: str,
        candidate: bool,
        content_hash: str = "",
        contest: Contest = NO_CONTEST,
        objections: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Register a model directory as a version of `name`: see `register_version`. A failure is a warning.

        Returns the recorded decision (`decision_of`).
        """
        decision: dict[str, Any] = {}
        with self.tolerated("model version"):
            number = register_version(
                self._client,
                self.run_id,
                name,
                model_dir,
                asset=asset,
                bits_per_byte=bits_per_byte,
                evaluation_text=evaluation_text,
                candidate=candidate,
                content_hash=content_hash,
                log=self._log,
                contest=contest,
                objections=objections,
            )
            decision |= decision_of(self._client.get_model_version(name, number))
        return decision

    def add_measurements(
        self,
        name: str,
        asset: str,
        content_hash: str,
        found: Mapping[str, str],
        contest: Contest = NO_CONTEST,
    ) -> dict[str, Any]:
        """Record what a later stage measured of a registered artifact: see `add_measurements`. A failure is a warning.

        Returns the decision (`decision_of`).
        """
        decision: dict[str, Any] = {}
        with self.tolerated("measurements of a version"):
            decision |= add_measurements(self._client, name, asset, content_hash, found, contest=contest, log=self._log)
        return decision

    def find_decision(self, name: str, asset: str, content_hash: str) -> dict[str, Any]:
        """The recorded decision on an artifact (`decision_of`); empty if there is none or the store fails."""
        decision: dict[str, Any] = {}
        with self.tolerated("query for the champion"):
            decision |= find_decision(self._client, name, asset, content_hash)
        return decision

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Turn an error of the tracking store into a warning."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a tracking store may raise anything
            self._warn(f"MLflow did not accept the {what}: {one_line(error)}")

    def release_files(self) -> None:
        """Call before logged files are moved: waits until they are sent, or saves copies for a later attempt."""
        deadline = time.monotonic() + FINAL_WAIT_S
        with self._changed:
            while self._files() and not self._is_failing and time.monotonic() < deadline:
                self._changed.wait(0.1)
            left = self._files()
        self._log_messages()
        if self._unsent is None:
            return
        with self.tolerated("files"):
            for number, entry in enumerate(left):
                entry["path"] = str(_copied(Path(entry["path"]), self._unsent / self.run_id / f"file-{number}"))

    def _files(self) -> list[dict[str, Any]]:
        return [entry for entry in self._queue if entry["kind"] in ("file", "folder")]

    def close(self) -> None:
        """Wait until all entries are sent, at most FINAL_WAIT_S for a server that does not answer; save the others."""
        deadline = None
        with self._changed:
            while self._queue:
                now = time.monotonic()
                deadline = (deadline or now + FINAL_WAIT_S) if self._is_failing else None
                if deadline and now > deadline:
                    break
                self._changed.wait(0.1)
            self._is_closed = True
            left = list(self._queue)
            self._changed.notify_all()
        self._log_messages()
        if left:
            self._keep(left)
        elif self._unsent is not None:
            shutil.rmtree(self._unsent / self.run_id, ignore_errors=True)

    def _put(self, **entry: Any) -> None:
        self._log_messages()
        with self._changed:
            self._queue.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                entry = self._queue[0]
            try:
                _send_or_drop(self._client, self.run_id, entry, self._messages.append)
            except Exception as error:  # noqa: BLE001 - a tracking store may raise anything
                if not self._is_failing:
                    self._messages.append(
                        f"MLflow did not accept the {entry['name']}: {one_line(error)}; it is kept and sent once "
                        "the store answers"
                    )
                with self._changed:
                    self._is_failing = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._is_closed, RETRY_EVERY_S)
                continue
            with self._changed:
                if not self._is_closed:
                    self._queue.popleft()
                if self._is_failing:
                    self._messages.append("MLflow answers again: the kept entries are being sent")
                self._is_failing = False
                self._changed.notify_all()

    def _log_messages(self) -> None:
        """Log the background thread's messages: only the step's own thread may write to Dagster's log."""
        while self._messages:
            self._warn(self._messages.popleft())

    def _keep(self, left: list[dict[str, Any]]) -> None:
        """Write the entries that were not sent to a file, with copies of the files that they upload."""
        if self._unsent is None:
            self._warn(f"MLflow did not accept {len(left)} entries: they are lost")
            return
        try:
            self._unsent.mkdir(parents=True, exist_ok=True)
            lines = []
            for number, entry in enumerate(left):
                kept = self._unsent / self.run_id
                if entry["kind"] in ("file", "folder") and not Path(entry["path"]).is_relative_to(kept):
                    entry = {**entry, "path": str(_copied(Path(entry["path"]), kept / str(number)))}
                lines.append(json.dumps(entry) + "\n")
            with (self._unsent / f"{self.run_id}.jsonl").open("a") as file:
                file.writelines(lines)
        except OSError as error:
            self._warn(f"MLflow did not accept {len(left)} entries, and they cannot be saved: {one_line(error)}")
            return
        self._warn(f"MLflow does not answer: {len(left)} entries are kept in {self._unsent} and sent by the next run")
