"""Turns the errors of a stage into Dagster failures of one line, permanent where no retry can mend them.

`allow_retries=False` stops an asset's RetryPolicy; run retries and automation do not look at it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from llm_assets.paths import var_dir
from model.errors import PipelineError, TransientError, limits_as_error


@contextmanager
def terminated_for_good(context: dg.AssetExecutionContext) -> Iterator[None]:
    """End a step that a person terminates without the retry that its policy would order.

    Dagster applies an asset's RetryPolicy to terminations too, but not to a failure that allows no retries.
    """
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        if context.op_def.retry_policy is None:
            raise
        raise dg.Failure(
            description="terminated; the next run goes on from what is saved", allow_retries=False
        ) from None


@contextmanager
def permanent_failures() -> Iterator[None]:
    """Raise `dg.Failure` for a PipelineError, with retries for a TransientError alone; let everything else pass.

    What the system refuses (`limits_as_error`) counts as one.
    """
    try:
        with limits_as_error(var_dir()):
            yield
    except PipelineError as error:
        raise dg.Failure(description=str(error), allow_retries=isinstance(error, TransientError)) from None
