"""Starts a training where `compute` says: in this process, or in several processes by torchrun or on Ray.

Each process runs `worker.py`, which calls the same `train`. The job and the reports of the processes are files in the
scratch folder, which all hosts share. Several hosts under torchrun: the first starts here, the others join it with the
command that the log shows (`agent.py`); Ray starts the processes on its hosts (`cluster.py`).
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import PipelineError, TransientError
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.system.lifeline import GRACE_S, Presence
from model.training.checkpoints.remote import RemoteCheckpoints, copied
from model.training.launch.job import JOB, PRESENCE, REPORTS, rendezvous
from model.training.outputs.summary import TrainingSummary
from model.training.run import OnMetrics
from model.training.train import train

_READ_EVERY_S = 0.2


def launch(
    settings: ExperimentSettings,
    dataset_dir: Path,
    output_dir: Path,
    scratch_dir: Path,
    *,
    log: Log = silent,
    on_metrics: OnMetrics | None = None,
    remote: RemoteCheckpoints | None = None,
) -> TrainingSummary:
    """`train` in this process, or in those that `settings.compute` names; the batch is the same for any number of them.

    remote: copies of the checkpoints, fetched if they are ahead of `scratch_dir`.
    All processes end when this one does, however it ends: with time to save, except where the kernel kills them.
    Raises what `train` raises, PipelineError if several hosts have no place to meet, and RuntimeError if
    processes died more often than `compute.restarts` allows: another call resumes from the last checkpoint.
    """
    with copied(remote, scratch_dir, log):
        return _launch(settings, dataset_dir, output_dir, scratch_dir, log, on_metrics)


def _launch(
    settings: ExperimentSettings,
    dataset_dir: Path,
    output_dir: Path,
    scratch_dir: Path,
    log: Log,
    on_metrics: OnMetrics | None,
) -> TrainingSummary:
    if settings.compute.engine == "local":
        return train(
            settings, dataset_dir, output_dir, scratch_dir, log=log, on_metrics=on_metrics, shares_batch=True
        )  # fmt: skip
    scratch_dir.mkdir(parents=True, exist_ok=True)
    presence = Presence(scratch_dir / PRESENCE)
    if not presence.wait_for_none(GRACE_S):
        raise PipelineError(
            f"processes of an earlier attempt still train in {scratch_dir}: wait until they have ended, or end them"
        )
    (scratch_dir / JOB).unlink(missing_ok=True)
    shutil.rmtree(scratch_dir / REPORTS, ignore_errors=True)
    (scratch_dir / REPORTS).mkdir()
    job = {"settings": asdict(settings)} | {
        name: str(path.absolute())
        for name, path in {"dataset": dataset_dir, "output": output_dir, "scratch": scratch_dir}.items()
    }
    partial = scratch_dir / f"{JOB}.partial"
    partial.write_text(json.dumps(job))
    partial.rename(scratch_dir / JOB)
    nodes, endpoint = (1, "") if settings.compute.engine == "ray" else rendezvous(settings.compute)
    if nodes > 1:
        command = ["python", "-m", "model.training.launch.agent", str(scratch_dir / JOB)]
        log(f"waiting at {endpoint} for {nodes - 1} more hosts: run on each `{shlex.join(command)}`")
    reports = Reports(scratch_dir / REPORTS, log, on_metrics)
    if settings.compute.engine == "ray":
        from model.training.launch.cluster import ray_processes

        start: Any = ray_processes(scratch_dir.absolute() / JOB, settings.compute, presence, log, reports.read)
    else:
        start = _agent(scratch_dir / JOB)
    with start as processes:
        while processes.poll() is None:
            time.sleep(_READ_EVERY_S)
            reports.read()
        reports.read()
    (scratch_dir / JOB).unlink()
    if not presence.wait_for_none(2 * GRACE_S):
        log("processes of this training on other hosts have not ended yet")
    if reports.summary is None:
        raise RuntimeError(
            f"the training processes ended with status {processes.returncode} and no result: their errors are above; "
            "the next attempt resumes from the last checkpoint"
        )
    return reports.summary


@contextmanager
def _agent(job: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Torchrun on this host; at the end of the block it and its workers end, with time to save."""
    command = [sys.executable, "-m", "model.training.launch.agent", "--end-with-input", str(job)]
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield agent
    finally:
        agent.send_signal(signal.SIGTERM)  # does nothing to one that has ended
        try:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(GRACE_S)
        finally:
            agent.kill()
            assert agent.stdin is not None
            agent.stdin.close()  # workers whose agent was killed end by this
            agent.wait()


class Reports:
    """Reads the reports of a training's processes from the files that they append to."""

    def __init__(self, directory: Path, log: Log, on_metrics: OnMetrics | None) -> None:
        """log, on_metrics: receive the reports of rank 0."""
        self._directory, self._log, self._on_metrics = directory, log, on_metrics
        self._read: dict[Path, int] = {}
        self.summary: TrainingSummary | None = None
        """Once the training is finished."""

    def read(self) -> None:
        """Pass on new reports. Raises the PipelineError that a process ended with."""
        for path in sorted(self._directory.glob("rank-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the rest of it is still being written
                    self._read[path] = self._read.get(path, 0) + len(line)
                    self._pass_on(json.loads(line))

    def _pass_on(self, report: dict[str, Any]) -> None:
        if "error" in report:
            raise (TransientError if report["is_transient"] else PipelineError)(report["error"])
        if "log" in report:
            self._log(report["log"])
        elif "metrics" in report and self._on_metrics is not None:
            self._on_metrics(report["step"], report["metrics"])
        elif "summary" in report:
            self.summary = TrainingSummary(**report["summary"])
