"""Turns the errors of a stage into Dagster failures of one line, permanent if a retry cannot help.

`allow_retries=False` stops an asset's RetryPolicy; run retries and automation ignore it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from llm_assets.paths import var_dir
from model.errors import PipelineError, TransientError, limits_as_error


@contextmanager
def no_retry_after_termination(
    context: dg.AssetExecutionContext | dg.InputContext | dg.OutputContext,
) -> Iterator[None]:
    """Do not retry a step that was terminated.

    Dagster applies an asset's RetryPolicy to terminations too, while it loads inputs, computes and publishes, but not
    to a failure that allows no retries.
    """
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        if context.op_def.retry_policy is None:
            raise
        raise dg.Failure(
            description="terminated; the next run resumes from the saved state", allow_retries=False
        ) from None


@contextmanager
def permanent_failures() -> Iterator[None]:
    """Raise `dg.Failure` for a PipelineError, with retries only for a TransientError; let everything else pass.

    Limits of the operating system (`limits_as_error`) count as PipelineErrors.
    """
    try:
        with limits_as_error(var_dir()):
            yield
    except PipelineError as error:
        raise dg.Failure(description=str(error), allow_retries=isinstance(error, TransientError)) from None
