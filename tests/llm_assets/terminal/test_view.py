import io
import re

import pytest
from rich.console import Console

from llm_assets.terminal.records import Record
from llm_assets.terminal.view import STAGE_LINES, WIDTH, View


class Watched:
    """A view of a console that keeps its text, at a time that the test sets."""

    def __init__(self, *, terminal: bool, width: int = WIDTH) -> None:
        self.file, self.now = io.StringIO(), 0.0
        console = Console(file=self.file, force_terminal=terminal, width=width, legacy_windows=False)
        self.view = View(console, clock=lambda: self.now)

    def say(self, text: str, *, level: str = "INFO", event: str = "", stage: str = "corpus") -> None:
        self.view.take(Record(level, stage, event, text))

    @property
    def lines(self) -> list[str]:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.file.getvalue()).splitlines()


@pytest.fixture
def plain() -> Watched:
    return Watched(terminal=False)


def test_without_a_terminal_each_message_is_a_line(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    plain.say("corpus: 47 documents")
    plain.now = 8.7
    plain.say("", event="STEP_SUCCESS")
    assert plain.lines == ["corpus: started", "corpus: 47 documents", "corpus             done           8.7 s"]


def test_progress_is_a_line_now_and_then(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    for second in range(100):
        plain.now = float(second)
        plain.say(f"step {second} of 100 ({second} %): loss 4.1")
    assert [line.split()[2] for line in plain.lines[1:]] == ["0", "30", "60", "90"]


def test_a_stage_takes_at_most_a_screen_of_80_columns(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    for number in range(100):
        plain.say(f"document {number} " + "of many words " * 9)
    plain.say("", event="STEP_SUCCESS")
    assert max(map(len, plain.lines)) <= WIDTH
    assert plain.lines[-2] == "corpus: further messages are in the log"
    assert sum(line.startswith("corpus: document") for line in plain.lines) == STAGE_LINES - 1


def test_a_runs_own_warning_is_shown_and_its_error_is_why_it_failed(plain: Watched) -> None:
    plain.say("Started execution of run", level="DEBUG", event="PIPELINE_START", stage="")
    plain.say("the step is stopped", level="WARNING", stage="")
    plain.say("no step can be started", level="ERROR", stage="")
    assert plain.lines == ["the step is stopped"] and plain.view.failures == ["no step can be started"]


def test_on_a_terminal_only_ends_and_warnings_stay() -> None:
    watched = Watched(terminal=True)
    watched.say("", event="STEP_START", stage="trained_checkpoint")
    watched.say("step 20 of 60 (33 %): loss 4.1, 0:12 left", stage="trained_checkpoint")
    watched.say("warning: the loss does not fall", stage="trained_checkpoint")
    watched.now = 22.5
    assert watched.view._working("trained_checkpoint").startswith("trained_checkpoint 0:22  warning: the loss")
    watched.say("step 40 of 60 (67 %): loss 4.0123, 31,234 tokens/s, 0:06 left", stage="trained_checkpoint")
    line = watched.view._working("trained_checkpoint").replace("\\", "")  # of rich's markup
    assert line.endswith("[######....] 0:06 left, step 40 of 60: loss 4.01...") and len(line) < WIDTH
    watched.say("", event="STEP_SUCCESS", stage="trained_checkpoint")
    watched.say("", event="STEP_START", stage="exported_model")
    watched.now += 1813.7
    watched.say("", event="STEP_SUCCESS", stage="exported_model")
    assert watched.lines == [
        "trained_checkpoint: warning: the loss does not fall",
        "trained_checkpoint done          22.5 s",
        "exported_model     done           30:14",
    ]


def test_an_unchanged_stage_and_a_failed_one_say_so(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    plain.say("unchanged: corpus of 'smoke' already has version 705d")
    plain.say("", event="STEP_SUCCESS")
    plain.say("", event="STEP_START", stage="tokenized_dataset")
    plain.say("tokenizer.vocab_size is 0: expected more", event="STEP_FAILURE", stage="tokenized_dataset")
    assert plain.lines[2].split()[:2] == ["corpus", "unchanged"]
    assert plain.lines[-1].split()[:2] == ["tokenized_dataset", "failed"]
    assert plain.view.failures == ["tokenized_dataset: tokenizer.vocab_size is 0: expected more"]


def test_a_stage_that_fails_again_says_why(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    plain.now = 2.0
    plain.say("the step asks for a retry in 5 seconds", event="STEP_UP_FOR_RETRY")
    plain.now = 8.0
    plain.say("", event="STEP_RESTARTED")
    plain.now = 11.0
    plain.say("the dataset cannot be reached", event="STEP_FAILURE")
    plain.say("the step's process ended", event="STEP_FAILURE")
    said = "Dependencies for step tokenized_dataset failed: ['corpus']. Not executing."
    plain.say(said, level="ERROR", stage="tokenized_dataset")
    assert plain.lines == [
        "corpus: started",
        "corpus             retrying       2.0 s",
        "corpus: started",
        "corpus             failed         3.0 s",
    ]
    assert plain.view.failures == ["corpus: the dataset cannot be reached"]


def test_a_stage_that_was_computed_and_came_out_equal_is_not_called_unchanged(plain: Watched) -> None:
    plain.say("", event="STEP_START")
    plain.say("unchanged: var/artifacts/corpus/smoke/705d already had this content")
    plain.say("", event="STEP_SUCCESS")
    assert plain.lines[-1].split()[:3] == ["corpus", "same", "result"]


def test_without_a_terminal_dots_show_that_a_silent_run_is_alive(plain: Watched) -> None:
    def wait(seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            plain.now += 0.5
            before = len(plain.file.getvalue()), silent_since[0]
            plain.view.tick()
            if len(plain.file.getvalue()) > before[0]:
                silent_since[0] = plain.now
            assert plain.now - silent_since[0] <= 3.0

    silent_since = [0.0]
    plain.view.live()
    assert plain.lines == ["starting ."]
    wait(6)
    plain.say("", event="STEP_START")
    silent_since[0] = plain.now
    wait(1.5)
    plain.say("corpus: 47 documents")
    silent_since[0] = plain.now
    wait(250)
    plain.view.close()
    assert plain.lines[:3] == ["starting ....", "corpus: started", "corpus: 47 documents"]
    assert all(re.fullmatch(r"corpus \.+", line) and len(line) <= WIDTH for line in plain.lines[3:])
    assert len(plain.lines) == 5


def test_a_message_keeps_its_paths_whole(plain: Watched) -> None:
    path = "/somewhere/" + "long/" * 20 + "report.md"
    plain.say(f"benchmark: the report is {path}", stage="benchmark_report")
    assert [line.strip() for line in plain.lines][1:] == [path]
