"""Turns the errors that no retry can mend into permanent Dagster failures of one line.

`allow_retries=False` stops an asset's RetryPolicy; run retries and automation do not look at it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from model.errors import PipelineError


@contextmanager
def permanent_failures() -> Iterator[None]:
    """Raise `dg.Failure(allow_retries=False)` for a PipelineError; let everything else pass."""
    try:
        yield
    except PipelineError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None
