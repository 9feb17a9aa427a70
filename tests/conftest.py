"""Fixtures and hooks for every test: one compute thread, markers that tell the truth, distribution by file.

`make test-fast` selects by marker, so a test that starts a process and does not say so fails here, and tests that take
longer than their marker says are listed at the end of a run.
"""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Collecting the tests imports millions of objects that stay: looking for garbage among them takes a fifth of that time,
# and again in each collection of a test. `pytest_collection_finish` turns it on.
gc.disable()

# Before any test imports torch. Models of tests are too small for two threads, and threads that wait for each other on
# a busy machine take minutes. Tests that measure or compare thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

from model.native.build import build, find_compiler

# Hypothesis fails an example that takes 200 ms, and examples that are made slowly: a busy machine does both.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Before any file is collected: a process keeps the library that it found first, or that there was none.
if find_compiler():
    build()

LIMITS_S = {"slow": (10.0, {"slow"}), "medium": (3.0, {"medium", "slow", "processes"})}
"""Seconds, with room for a busy machine, from which a test needs the marker, and the markers that do as well."""
SLOWEST_FILES = (
    "e2e/test_stack.py",
    "e2e/test_two_hosts.py",
    "model/system/test_cluster.py",
    "e2e/test_webserver.py",
    "e2e/test_ui.py",
)
"""Files that take minutes, the longest first; those of `tests/e2e` share no pipeline run with others."""
PROGRAMS = (
    "bash",
    "bentoml",
    "chromedriver",
    "dagster",
    "docker",
    "initdb",
    "make",
    "mlflow",
    "pg_ctl",
    "python",
    "setpriv",
    "uv",
)
"""Programs that count as a process of a test: libraries look at the machine with others, such as `file` and `lscpu`."""
MARKS_OF_FIXTURES = {
    "opened_at_once": ["processes"],
    "directories": ["processes"],
    "int8_dir": ["processes"],
    "report": ["processes", "slow"],
}
"""What shared fixtures cost: their tests get the markers, whichever of them comes first and pays."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that no file leaves ignored, which processes that later tests start would inherit; handlers they do not."""

_handlers: dict[signal.Signals, Any] = {}
_started: list[str] = []
_durations: dict[str, float] = {}
_markers: dict[str, set[str]] = {}


def _note_process(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name.startswith(PROGRAMS):
        _started.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note_process)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --nightly."""
    parser.addoption("--nightly", action="store_true", help="run the tests with the marker `nightly`, too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest first: at the end of a run the other workers would wait for them. After the pipeline and its
    services come the files that have a worker of their own, then those of the whole repository.
    """

    def place(item: pytest.Item) -> tuple[bool, int, bool]:
        file = item.path.relative_to(Path(__file__).parent)
        rank = SLOWEST_FILES.index(file.as_posix()) if file.as_posix() in SLOWEST_FILES else len(SLOWEST_FILES)
        return rank < len(SLOWEST_FILES) or file.parts[0] != "e2e", rank, len(file.parts) > 1

    items.sort(key=place)  # stable within a file
    if twice := [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]:
        raise pytest.UsageError(f"several tests are called {twice[0]}: pytest-xdist would run one; give each a name")
    for item in items:
        for fixture in MARKS_OF_FIXTURES.keys() & set(getattr(item, "fixturenames", ())):
            for name in MARKS_OF_FIXTURES[fixture]:
                item.add_marker(name)
        if item.get_closest_marker("e2e"):
            item.add_marker("processes")
            item.add_marker("slow")
        if item.get_closest_marker("nightly") and not config.option.nightly:
            item.add_marker(pytest.mark.skip(reason="nightly, as it takes long: `make test-nightly`, or --nightly"))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but not among what the imports made."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: give each worker whole files, and one of them those of `tests/e2e` that share one
    pipeline run.

    Not by the mark `xdist_group`, which pytest-xdist 3.8 loses under pytest 9.2.
    """
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "tests/e2e" if file.startswith("tests/e2e/") and not file.endswith(SLOWEST_FILES) else file

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Forget the processes of earlier tests."""
    _started.clear()
    if not _handlers:
        _handlers.update({number: signal.getsignal(number) for number in SIGNALS})
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Fail a test that started a process, in a fixture or by itself, without saying so, and a file that leaves a signal
    ignored.
    """
    before = list(_started)
    result = yield
    # The last test of a file also tears down the fixtures that tests share, such as a database.
    is_last = nextitem is None or nextitem.path != item.path
    ignored = [number for number, former in _handlers.items() if former != signal.getsignal(number) == signal.SIG_IGN]
    if is_last and ignored:
        for number in ignored:
            signal.signal(number, _handlers[number])
        pytest.fail(f"a test of its file leaves {ignored[0].name} ignored: restore the handler")
    started = before if is_last else _started
    if started and not item.get_closest_marker("processes"):
        pytest.fail(f"it starts a process ({started[0]}): give it the marker `processes`, or `e2e` with a whole tool")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up setup, call and teardown."""
    _durations[report.nodeid] = _durations.get(report.nodeid, 0.0) + report.duration
    _markers[report.nodeid] = {"medium", "slow", "processes"} & set(report.keywords)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what took long and does not say so; a busy machine makes this list longer."""
    for name, (limit, enough) in LIMITS_S.items():
        unmarked = {test: s for test, s in _durations.items() if s > limit and not enough & _markers[test]}
        if unmarked:
            terminalreporter.section(f"over {limit:.0f} s without the marker `{name}`")
            for test, seconds in sorted(unmarked.items(), key=lambda entry: -entry[1]):
                terminalreporter.write_line(f"{seconds:6.1f} s  {test}")
