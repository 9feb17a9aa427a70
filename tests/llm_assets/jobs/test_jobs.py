import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.executor.init import InitExecutorContext

from llm_assets.jobs import jobs
from llm_assets.jobs.jobs import EVERY_STEP, NOT_FORKED, WatchedExecutor, stage_modules
from llm_assets.registry import PIPELINE

STEP = """
import multiprocessing, sys

def step():
    assert "model.training.train" in sys.modules  # before anything here imports it
    import torch
    torch.set_num_threads(2)
    ones = torch.ones(1024, 1024, requires_grad=True)
    (ones @ ones).sum().backward()
    assert ones.grad[0, 0] == 2048

if __name__ == "__main__":
    from llm_assets.jobs.jobs import EVERY_STEP, stage_modules
    from llm_assets.registry import PIPELINE
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*EVERY_STEP, *stage_modules(PIPELINE, gpu_drivers=())])
    for _ in range(2):
        process = context.Process(target=step)
        process.start()
        process.join(240)
        assert process.exitcode == 0, process.exitcode
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_step_computes_with_several_threads_in_a_process_forked_after_the_imports(tmp_path: Path) -> None:
    program = tmp_path / "step.py"
    program.write_text(STEP)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


class Dies(dg.Executor):
    """As Dagster's when the process that forks steps ends during its imports."""

    retries = None  # type: ignore[assignment]

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        raise EOFError("unexpected EOF")


def test_a_run_whose_steps_cannot_be_started_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    context, plan = SimpleNamespace(log=logging.getLogger("run")), SimpleNamespace(step_keys_to_execute=["corpus"])
    with pytest.raises(EOFError):
        list(WatchedExecutor(lambda keys: Dies()).execute(context, plan))  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == [NOT_FORKED] and "\n" not in NOT_FORKED


def test_where_there_is_a_gpu_each_step_imports_torch_itself(tmp_path: Path) -> None:
    driver = tmp_path / "nvidiactl"
    driver.touch()
    assert stage_modules(PIPELINE, gpu_drivers=[str(driver)]) == []
    assert "model.training.train" in stage_modules(PIPELINE, gpu_drivers=[str(tmp_path / "none")])


def test_a_run_imports_once_what_its_own_stages_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "stage_modules", partial(stage_modules, gpu_drivers=()))
    config = {"retries": {"enabled": {}}, "max_concurrent": 2}
    build = jobs.executor.executor_creation_fn(InitExecutorContext._make([None, None, config, None]))._build

    def preloaded(*keys: str) -> list[str]:
        return build(keys)._explicit_forkserver_preload[1:]

    assert preloaded("corpus", "tokenized_dataset") == [*EVERY_STEP]
    assert preloaded("corpus", "trained_checkpoint") == [*EVERY_STEP, "model.training.train"]
