"""The documentation holds: its commands, paths and links exist. Its English, and that of the code, is American."""

import re
import runpy
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented import (
    PAGES,
    REPO,
    commands,
    documented_commands,
    inline_code,
    problems_of_command,
    problems_of_links,
    problems_of_path,
)

COMMANDS = sorted({command for page in PAGES for command in documented_commands(page)})
MODULES = sorted({match[1] for command in COMMANDS if (match := re.search(r"python -m ([\w.]+)", command))})


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_that_a_documented_command_names_exists(command: str) -> None:
    assert problems_of_command(command) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_headings_that_a_page_names_exist(page: Path) -> None:
    named = [problem for span in inline_code(page) for problem in problems_of_path(span)]
    assert named + problems_of_links(page) == []


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and output of `python -m MODULE --help` by module.

    All are forks of one process that has imported what takes seconds, so that they share it.
    """
    folder = tmp_path_factory.mktemp("usages")
    program = """
import os, runpy, sys
import dagster, mlflow, transformers.trainer
import model.generation.engine, model.weights.loading
for module in sys.argv[2:]:
    if os.fork() == 0:
        output = os.open(os.path.join(sys.argv[1], module), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv[:] = [module, "--help"]
        status = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code or 0
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # the usual end would take all those modules apart, which takes seconds
    print(module, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
    command = [sys.executable, "-c", program, str(folder), *MODULES]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    statuses = dict(line.split() for line in done.stdout.splitlines())
    return {module: (int(statuses[module]), (folder / module).read_text()) for module in MODULES}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("module", MODULES)
def test_a_documented_module_says_how_it_is_used(module: str, usages: dict[str, tuple[int, str]]) -> None:
    status, printed = usages[module]
    assert status == 0, printed
    assert len(printed) > 50


AVOIDED = re.compile(
    r"\b(nobody|everybody|anybody|whoever|licence|artefact|analyse|catalogue|centre|distil|fulfil|grey|whilst|judgement"
    r"|(?:behavio|colo|favo|flavo|hono|neighbo)ur\w*|(?:cancel|label|model|signal|travel)l(?:ed|ing)"
    r"|(?:general|initial|minim|maxim|normal|optim|orthogonal|quant|serial|summar|token|vector)is(?:e|ed|es|ing|ation))\b",
    re.IGNORECASE,
)
RIDDLES = re.compile(
    r"\b(is asked for|are asked for|who asks|to speak of|in one go|ask again"
    r"|that is there already|the machine's mood|data sets?|anew|for good|mends?|mended|(?:can|cannot) be had"
    r"|so many (?:of|tokens|windows)|(?:another|earlier|later|next|each) try|also where|(?:\w*Error|None|empty),? where"
    r"|(?:environment|process|process group|project name|session|thread) of its own|(?:processes|threads) of their own"
    r"|shared? out|asks? for nothing|without a word"
    r"|(?<!there )(?:is|are) no (?!longer|better|faster|slower|smaller|larger|more|less)\w+)\b",
    re.IGNORECASE,
)
"""Phrases that were rewritten in the field's words: "if" for "where", "is not a" for "is no", the field's nouns."""


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of a file's comments, docstrings and messages; of other kinds of files, every line.

    A message is a string of at least three words: shorter ones are names and values.
    """
    if file.suffix != ".py":
        yield from enumerate(file.read_text().splitlines(), 1)
        return
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            is_text = tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE") and token.string.count(" ") > 1
            if is_text or token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def test_comments_and_messages_are_in_american_english_and_name_their_subjects() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".cpp", ".h", ".js", ".css", ".html", ".txt", ".example", ""}
    files = [REPO / name for name in listed if Path(name).suffix in kinds and name != "tests/test_docs.py"]
    found = [
        f"{file.relative_to(REPO)}:{line}: {match[0]}"
        for file in files
        if file.is_file()
        for line, text in prose(file)
        for match in [*AVOIDED.finditer(text), *RIDDLES.finditer(text)]
    ]
    assert not found, "\n".join(found)
    assert len(files) > 300
    assert AVOIDED.findall("Whoever normalises colours, and a license") == ["Whoever", "normalises", "colours"]
    assert RIDDLES.findall("What is asked for runs in a process of its own") == ["is asked for", "process of its own"]
    assert RIDDLES.findall("Raises ValueError where it is no text") == ["ValueError where", "is no text"]
    assert not RIDDLES.search("Raises ValueError if there is no text where one is expected")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("make pipelines", "no such target"),
        ("make pipeline EXPERIMENTS=smoke", "no such variable"),
        ("make pipeline EXPERIMENT=smokes", "no experiment 'smokes'"),
        ("make pipeline OVERRIDES=training.max_step=5", "max_step"),
        ("make sweep EXPERIMENT=smoke OVERRIDES=training.optim=muon,adam", "adam"),
        ("python -m llm_assets.last", "no such module"),
        ("python -m llm_assets.latest --newest", "no such option"),
        ("python -m llm_assets.experiments stdlib training.max_steps=many", "max_steps"),
        ("dagster job execute -m llm_assets.definitions -j llm_pipelines", "no such job"),
        ("dagster asset materialize -m llm_assets.definitions --select trained_model+", "trained_model"),
        ("dagster job execute -m llm_assets.definition -j llm_pipeline", "no such command or code location"),
        ("bentoml serve bento.service:Service", "no such service"),
        ("docker compose up --detach generator", "no such service"),
        ("docker compose --profile cuda up", "no such profile"),
        ("curl -s http://127.0.0.1:3000/complete", "no such route"),
        ("pip install '.[trace]'", "no such extra"),
        ("REX_THREAD=1 make serve", "no service reads this variable"),
        ("pytest tests/models", "does not exist"),
        ("fab deploy", "no check knows this program"),
    ],
)
def test_a_wrong_command_is_found(command: str, says: str) -> None:
    assert any(says in problem for problem in problems_of_command(command))


def test_a_wrong_path_and_a_wrong_link_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n`model/generation/motor.py` [one](other.md) [two](#a-page) [three](#another)\n")
    assert [problem for span in inline_code(page) for problem in problems_of_path(span)] == [
        "model/generation/motor.py: does not exist"
    ]
    assert problems_of_links(page) == ["other.md: does not exist", "#another: no such heading"]


def test_a_block_is_read_as_a_shell_reads_it() -> None:
    block = 'A=1 make up \\\n  DEVICE=gpu  # comment\ncat "$(make image)" | wc > out\n'
    assert [" ".join(words) for words in commands(block)] == [
        "A=1 make up DEVICE=gpu", "make image", "cat $(make image)", "wc > out",
    ]  # fmt: skip


def test_the_tables_of_options_are_what_the_fields_say() -> None:
    found = runpy.run_path(str(REPO / "docs" / "generate.py"))
    for page in found["PAGES"]:
        assert found["generated"](page.read_text()) == page.read_text(), f"{page.name}: run `make docs`"
    tables = "".join(page.read_text() for page in found["PAGES"])
    assert "| `muon_momentum` |" in tables and "| `REX_MAX_QUEUE` |" in tables
