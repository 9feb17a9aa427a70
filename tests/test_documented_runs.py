"""Every documented command runs in a test, or the table in `tests/support/documented_runs.py` says why none runs it.

Commands that read a finished run are tested in `tests/e2e/test_pipeline.py`.
"""

import ast
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.test_tasks import QUESTIONS, TASK
from tests.e2e.workplace import BIN, REPO, Workplace, free_port, new_workplace, started
from tests.support.documented import PAGES, documented_commands
from tests.support.documented_runs import TABLE, Nightly, Resolves, Runs, TestedBy, way_of
from tests.support.harness import needs_harness

COMMANDS = sorted({command for page in PAGES for command in documented_commands(page)})
WAYS = {command: found[1] for command in COMMANDS if (found := way_of(command))}
RESOLVED = [command for command, way in WAYS.items() if isinstance(way, Resolves)]
STDLIB = "make pipeline"
NIGHTLY = [
    command
    for command, way in WAYS.items()
    if (isinstance(way, Nightly) or (isinstance(way, Resolves) and way.nightly)) and command != STDLIB
]
FIRST = "first"
"""The folder with the artifacts of the run that the nightly commands build on."""
COMPLETE = {"EXPERIMENT=NAME": "EXPERIMENT=smoke"}


def test_each_command_has_a_line_and_each_line_a_command() -> None:
    assert [command for command in COMMANDS if command not in WAYS] == []
    used = {found[0] for command in COMMANDS if (found := way_of(command))}
    assert [pattern for pattern in TABLE if pattern not in used] == []
    assert way_of("make pipelines") is None


def test_the_tests_that_the_table_names_exist() -> None:
    named = {way.name for way in TABLE.values() if isinstance(way, TestedBy)}
    named |= {way.why_not for way in TABLE.values() if isinstance(way, Resolves) and "::" in way.why_not}
    assert len(named) > 10
    for name in sorted(named):
        file, _, function = name.partition("::")
        functions = {
            node.name for node in ast.parse((REPO / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert function in functions, name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return new_workplace(tmp_path_factory.mktemp("documented"))


def as_given(command: str, workplace: Workplace, *words: str) -> str:
    """The line for the shell, with this environment and its state."""
    program, *rest = [COMPLETE.get(word, word) for word in shlex.split(command)]
    if program == "make":
        # The extra of `make evaluation` would be installed from an index.
        return shlex.join([*workplace.make(*rest, *words), "INSTALL=true"])
    return shlex.join([str(BIN / Path(program).name), *rest, *words])


def run(line: str, workplace: Workplace, folder: Path = REPO, timeout: float = 300) -> str:
    """Run a line in bash; returns what it prints, and fails if it fails."""
    done = workplace.run("/bin/bash", "-c", line, folder=folder, timeout=timeout)
    assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command, way in WAYS.items() if isinstance(way, Runs)])
def test_a_short_command_runs(command: str, workplace: Workplace) -> None:
    way = WAYS[command]
    assert isinstance(way, Runs)
    assert run(as_given(command, workplace, *shlex.split(way.words)), workplace).strip()


def settings_of(command: str) -> tuple[str, list[str]]:
    """Experiment and overrides of a command, as a reader understands it."""
    given = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    experiment = given.get("EXPERIMENT", "stdlib").replace("NAME", "smoke")
    return experiment, shlex.split(given.get("OVERRIDES", ""))


def values_of(swept: str) -> list[str]:
    """The points of a swept option, `range(START,STOP)` or values with commas."""
    if bounds := re.fullmatch(r"range\((\d+),(\d+)\)", swept):
        return [str(value) for value in range(int(bounds[1]), int(bounds[2]))]
    return swept.split(",")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("command", RESOLVED)
def test_the_settings_of_a_command_arrive_through_make_the_shell_and_hydra(command: str, workplace: Workplace) -> None:
    is_make = command.startswith("make")
    line = as_given(command, workplace, *(["DRY_RUN=true"] if is_make else ["--dry-run", "hydra.sweeper.n_trials=2"]))
    planned = [
        shlex.split(printed.partition(": ")[2])
        for printed in run(line, workplace).splitlines()
        if "would run" in printed
    ]
    if not is_make:
        assert len(planned) == 2 and all("training.muon_learning_rate=" in words[1] for words in planned)
        return
    experiment, overrides = settings_of(command)
    choices = [[override] for override in overrides]
    if command.startswith("make sweep"):
        named = [override.split("=") for override in overrides]
        choices = [[f"{name}={value}" for value in values_of(values)] for name, values in named]
    assert planned == [[experiment, *point] for point in itertools.product(*choices)]
    assert not (workplace.var / "artifacts").exists()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A copy of the repository with the files that commands name, and a short run of `stdlib` in its `var`."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, folder / name)
    for name in ("notes", "notes/deep", "data", "data/deep", "tasks"):
        (folder / name).mkdir()
    words = [f"A note about the number {number} and its square {number**2}.\n" for number in range(40_000)]
    for number in range(40):
        place = ["notes/{}.md", "notes/deep/{}.md", "data/{}.txt", "data/deep/{}.txt"][number % 4]
        (folder / place.format(number)).write_text("".join(words[1000 * number :][:1000]))
    rows = [{"prompt": f"What is {number}?", "response": f"It is {number * 2}."} for number in range(300)]
    (folder / "data/conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "I do not know."} for row in rows]
    (folder / "data/preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    answers = [dict(zip(("question", "first", "second", "answer"), row, strict=True)) for row in QUESTIONS]
    (folder / "data/questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "tasks/mine.yaml").write_text(TASK.format(data=folder / "data/questions.jsonl"))
    made = new_workplace(folder / "state")
    made.variables["PYTHONPATH"] = str(folder)
    made.variables["HF_DATASETS_CACHE"] = str(folder / "cache")
    run(whole(STDLIB, made), made, folder, timeout=1800)
    shutil.copytree(made.var / "artifacts", folder / FIRST)
    yield made


@pytest.fixture
def checkout(short_run: Workplace) -> Iterator[Workplace]:
    """`short_run`, whose artifacts of `stdlib` are afterwards those from before: commands build on them, and the store
    keeps the newest few of those that a command makes.
    """
    yield short_run
    for first in (short_run.root.parent / FIRST).glob("*/stdlib"):
        asset = short_run.var / "artifacts" / first.parent.name / "stdlib"
        shutil.rmtree(asset)
        shutil.copytree(first, asset)


def whole(command: str, checkout: Workplace) -> str:
    """The line that runs a command with the least settings."""
    way = WAYS[command]
    if isinstance(way, Nightly):
        return as_given(command, checkout, *shlex.split(way.words))
    assert isinstance(way, Resolves)
    if not command.startswith("make"):
        return as_given(command, checkout, *shlex.split(way.nightly))
    plain = [word for word in shlex.split(command) if not word.startswith("OVERRIDES=")]
    overrides = [word.removeprefix("OVERRIDES=") for word in shlex.split(command) if word.startswith("OVERRIDES=")]
    return as_given(shlex.join(plain), checkout, f"OVERRIDES={' '.join([*overrides, way.nightly])}")


@pytest.mark.nightly
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=needs_harness) if c.startswith("make evaluation") else c for c in NIGHTLY],
)
def test_a_nightly_command_runs(command: str, checkout: Workplace, tmp_path: Path) -> None:
    folder, way, line = checkout.root.parent, WAYS[command], whole(command, checkout)
    port = free_port()
    line = line.replace("{port}", str(port)).replace(
        "'{checkpoint}'", str(checkout.latest("trained_checkpoint", "stdlib"))
    )
    if "{bento}" in line:
        tag = run(as_given("python -m llm_assets.latest stdlib --bento", checkout), checkout, folder).strip()
        line = re.sub(r"BENTO=rex-stdlib:OLD PORT=\d+ ", "", line).replace("{bento}", tag)
    if not isinstance(way, Nightly) or not way.answers:
        assert run(line, checkout, folder, timeout=3000).strip()
        return
    url = f"http://127.0.0.1:{port}{way.answers}"
    with started(["bash", "-c", f"exec {line}"], checkout, url, tmp_path / "log", folder):
        pass
