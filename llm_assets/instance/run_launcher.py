"""Starts runs beside the code location's server, as Dagster does by default, and reports runs whose process died.

Dagster's own launcher leaves a run STARTED forever when the server went down with it (a restart, out of memory). The
server knows which of its processes live: run monitoring asks it, marks the other runs failed and frees their pool
slots.

    python -m llm_assets.instance.run_launcher [--end-with-input] LOCATION job execute ...

is Dagster's command for runs that its home page and timeline show, which show runs of a known code location. Dagster
records the location of runs that a page launched, but not of its command's: this adds it to the run. With
--end-with-input, the run is terminated and saves its work when its standard input ends, as it does if the process that
started it is killed.

The one place of this project that uses Dagster's private modules; seen to work on dagster 1.13.27: `dagster._cli.main`,
`dagster._core.remote_origin` (RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin) with the argument
`remote_job_origin` of `DagsterInstance.create_run_for_job`, `dagster._core.launcher` (CheckRunHealthResult,
DefaultRunLauncher and its `_get_grpc_client_for_termination`, WorkerStatus), `dagster._grpc.types`
(CanCancelExecutionRequest, CanCancelExecutionResult) and `dagster._serdes.deserialize_value`.
"""

import signal
import sys
from typing import Any

from dagster import DagsterInstance, DagsterRun, JobDefinition
from dagster._cli import main
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

from model.system.lifeline import end_with_input, signal_at_parents_end


class WatchedRunLauncher(DefaultRunLauncher):
    """Named in `dagster.yaml` as `run_launcher`."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Tells run monitoring to check the health of runs."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """RUNNING while the server has a process for the run. Raises the client's error if there is no answer."""
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:  # it has ended since it was listed, or was never started
            return CheckRunHealthResult(WorkerStatus.UNKNOWN)
        request = CanCancelExecutionRequest(run_id=run.run_id)
        lives = deserialize_value(client.can_cancel_execution(request), CanCancelExecutionResult).can_cancel
        if lives:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the code location's server has no process for it")


def record_location(location: str) -> None:
    """Let each run that this process creates be of a code location of `workspace.yaml`."""
    create = DagsterInstance.create_run_for_job
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), "__repository__")

    def create_located(instance: DagsterInstance, job_def: JobDefinition, **arguments: Any) -> DagsterRun:
        arguments["remote_job_origin"] = RemoteJobOrigin(repository, job_def.name)
        return create(instance, job_def, **arguments)

    DagsterInstance.create_run_for_job = create_located  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if sys.argv[1] == "--end-with-input":
        sys.argv.pop(1)
        signal_at_parents_end(signal.SIGCONT)  # a stopped run would not notice
        end_with_input()
    record_location(sys.argv.pop(1))
    main()
