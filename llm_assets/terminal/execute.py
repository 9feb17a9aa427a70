"""Runs a job of one experiment and displays it, for `make pipeline`, `make image` and sweeps.

    python -m llm_assets.terminal.execute smoke [--force] [--dry-run] [OVERRIDE ...]
    python -m llm_assets.terminal.execute smoke --job training_pipeline
    python -m llm_assets.terminal.execute smoke --module llm_assets.images --job container_image_cpu_job

`dagster job execute` runs the job. All records of the run go to var/logs/; the terminal shows progress, warnings and
results.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from llm_assets.artifacts.store import ArtifactStore
from llm_assets.experiments.compose import compose
from llm_assets.paths import output_folder, shown_path
from llm_assets.terminal.records import Follower, Record
from llm_assets.terminal.view import View
from model.errors import ends_in_one_line, free_bytes, no_space
from model.system.processes import is_stopped

DEFINITIONS, PIPELINE, TRAINING = "llm_assets.definitions", "llm_pipeline", "training_pipeline"
LOCATION_TAG = ".dagster/repository"
"""With it, a run that was started here is listed on its job's page."""
POLL_EVERY_S = 0.2
STOPPED_POLLS = 15
"""Polls that find the run's process stopped before that is printed."""
_INTERRUPTED = 130
_MIN_FREE_BYTES = 1 << 20
"""Free bytes of a disk below which it counts as full: Dagster's databases need more at their first record."""


def execute_job(
    experiment: str,
    overrides: Sequence[str],
    module: str = DEFINITIONS,
    job: str = PIPELINE,
    *,
    tags: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> int:
    """Run `job` of `module` for one experiment; returns the exit status of Dagster's command.

    tags: of the run, besides its partition. A signal is passed on to the run, which saves its work.

    Raises PipelineError if the disk of the logs or of Dagster's home is full.
    """
    console = console or Console()
    view, logs = View(console), output_folder("logs")
    for written in (logs, Path(os.environ.get("DAGSTER_HOME") or logs)):
        if free_bytes(written) < _MIN_FREE_BYTES:
            raise no_space(written)
    log = logs / f"{datetime.now():%Y%m%d-%H%M%S}-{experiment}-{os.getpid()}.log"
    log.touch()
    config = {
        "resources": {"hydra": {"config": {"overrides": list(overrides)}}},
        "loggers": {"file": {"config": {"path": str(log)}}},
    }
    location = module.replace("llm_assets.definitions", "llm_assets").rpartition(".")[2]
    all_tags = {"dagster/partition": experiment, LOCATION_TAG: f"__repository__@{location}", **(tags or {})}
    if overrides:
        all_tags.setdefault("rex/overrides", " ".join(overrides))
    follower = Follower(log)
    with tempfile.TemporaryDirectory() as folder, log.with_suffix(".out").open("w") as out:
        config_file = Path(folder) / "run_config.yaml"
        config_file.write_text(json.dumps(config))  # JSON is YAML
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "llm_assets.instance.run_launcher",
            "--end-with-input",
            location,
        ]
        command += ["job", "execute", "-m", module, "-j", job, "-c", str(config_file), "--tags", json.dumps(all_tags)]
        # The run ends with this process, however that ends: only this one holds the other end of its input.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
        before = signal.signal(signal.SIGTERM, lambda number, frame: _end(process, signal.SIGTERM))
        try:
            with view.live():
                status = _watch(process, follower, view)
        finally:
            signal.signal(signal.SIGTERM, before)
            follower.close()
    if status:
        _explain(console, view, log, status)
    return status


def check_settings(experiment: str, overrides: Sequence[str], job: str = PIPELINE, *, dry_run: bool = False) -> None:
    """Resolve the settings as the run does: a mistake is found in a second, and not by the run's first step.

    Nor is a corpus made for a training whose GPU is not there. A dry run may be for another machine, Ray may have GPUs
    elsewhere, and with a checkpoint there may be nothing to train.
    Raises PipelineError for a mistake, and for a device that PyTorch does not see.
    """
    settings = compose(experiment, overrides)
    from_text = job in (PIPELINE, TRAINING)
    trains_on_gpu = from_text and settings.compute.engine != "ray" and settings.training.device == "cuda"
    if trains_on_gpu and not dry_run and not ArtifactStore.default().latest_manifest("trained_checkpoint", experiment):
        from model.system.devices import resolve_device  # imports torch, for seconds

        resolve_device(settings.training.device)


def print_planned(job: str, experiment: str, overrides: Sequence[str]) -> None:
    """Print the run that would start, for `--dry-run`."""
    print(f"would run {job}: {shlex.join([experiment, *overrides])}", flush=True)


def _end(process: subprocess.Popen[bytes], *signals: signal.Signals) -> None:
    """Send signals to the run, which acts on them even if it was stopped."""
    for number in (*signals, signal.SIGCONT):
        process.send_signal(number)


def _watch(process: subprocess.Popen[bytes], follower: Follower, view: View) -> int:
    """Show records until the process has ended. Ctrl-C reaches that process too, and this waits for it."""
    interrupted = False
    stopped_polls = 0
    while True:
        try:
            ended = process.poll()
            stopped_polls = stopped_polls + 1 if is_stopped(process.pid) else 0
            if stopped_polls == STOPPED_POLLS:
                view.take(Record("WARNING", "", "", f"the run is stopped: `kill -CONT {process.pid}` continues it"))
            for record in follower.records():
                view.take(record)
            view.tick()
            if ended is not None:
                return _INTERRUPTED if interrupted else ended
            time.sleep(POLL_EVERY_S)
        except KeyboardInterrupt:
            interrupted = True
            _end(process)


def _explain(console: Console, view: View, log: Path, status: int) -> None:
    """Print why a run failed: the stages' reasons, or the last line that the command printed."""
    printed = [
        line.strip() for line in log.with_suffix(".out").read_text(errors="replace").splitlines() if line.strip()
    ]
    said = view.failures or printed[-1:]
    if free_bytes(log.parent) < _MIN_FREE_BYTES and not any("no disk space left" in reason for reason in said):
        said = [str(no_space(log.parent))]  # a step whose failure could not be recorded has another reason here
    for reason in said or [f"the run ended with status {status} and no message; run again"]:
        console.print(f"error: {reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"log: {shown_path(log)}", markup=False, highlight=False, soft_wrap=True)


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.terminal.execute", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", help="as in configs/experiment/")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as training.max_steps=100")
    parser.add_argument("--module", default=DEFINITIONS, help=f"default: {DEFINITIONS}")
    parser.add_argument(
        "--job", default=PIPELINE, help=f"default: {PIPELINE}; {TRAINING} ends with the trained checkpoint"
    )
    parser.add_argument("--force", action="store_true", help="compute unchanged stages too")
    parser.add_argument("--dry-run", action="store_true", help="check the settings and compute nothing")
    given = parser.parse_intermixed_args(argv)
    check_settings(given.experiment, given.overrides, given.job, dry_run=given.dry_run)
    if given.dry_run:
        print_planned(given.job, given.experiment, given.overrides)
        return 0
    tags = {"rex/force": "true"} if given.force else {}
    return execute_job(given.experiment, given.overrides, given.module, given.job, tags=tags)


if __name__ == "__main__":
    sys.exit(main())
