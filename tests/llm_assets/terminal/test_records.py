import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from llm_assets.terminal.file_logger import file_logger
from llm_assets.terminal.records import Follower


def test_the_records_of_a_run_are_lines_with_stage_event_and_reason(tmp_path: Path) -> None:
    @dg.op
    def corpus(context: dg.OpExecutionContext) -> None:
        context.log.info("47 documents\nfrom 47 sources")
        raise dg.Failure(description="no file matches /nowhere/*.txt", allow_retries=False)

    @dg.op
    def broken(context: dg.OpExecutionContext) -> None:
        raise ValueError("a - b")

    @dg.job(logger_defs={"file": file_logger})
    def pipeline() -> None:
        corpus()
        broken()

    log = tmp_path / "run.log"
    log.touch()
    follower = Follower(log)
    assert list(follower.records()) == []
    pipeline.execute_in_process(run_config={"loggers": {"file": {"config": {"path": str(log)}}}}, raise_on_error=False)
    records = list(follower.records())
    follower.close()
    said = [(record.level, record.stage, record.event, record.text) for record in records]
    assert ("INFO", "corpus", "", "47 documents from 47 sources") in said
    failures = {record.stage: record.text for record in records if record.event == "STEP_FAILURE"}
    assert failures["corpus"] == "no file matches /nowhere/*.txt"
    assert failures["broken"].endswith("a - b")
    assert {record.stage for record in records if record.event == "STEP_START"} == {"corpus", "broken"}


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.touch()
    follower = Follower(log)
    with log.open("a") as file:
        file.write("2026-11-27T16:12:48 INFO     corpus              -                        47 docu")
        file.flush()
        assert list(follower.records()) == []
        file.write("ments\n")
    (record,) = follower.records()
    follower.close()
    assert (record.stage, record.text) == ("corpus", "47 documents")


@pytest.mark.processes
def test_a_terminal_does_not_wait_for_dagster_before_the_first_line_and_the_results() -> None:
    program = "import sys, llm_assets.terminal.execute, llm_assets.sweep, llm_assets.latest; "
    program += "print('dagster' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
