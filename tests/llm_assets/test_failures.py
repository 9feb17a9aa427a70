import dagster as dg
import pytest

from llm_assets.failures import permanent_failures
from model.errors import PipelineError, TransientError


@pytest.mark.parametrize(("kind", "attempts"), [(PipelineError, 1), (TransientError, 3)])
def test_only_an_error_that_another_try_can_mend_is_retried(kind: type[PipelineError], attempts: int) -> None:
    tries = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def reads() -> None:
        tries.append(1)
        with permanent_failures():
            raise kind("a.txt cannot be read: the address does not answer")

    result = dg.materialize([reads], raise_on_error=False)
    assert not result.success and len(tries) == attempts
