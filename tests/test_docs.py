"""The documentation holds: its commands, paths and links exist, and its spelling is American."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import (
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


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("module", MODULES)
def test_a_documented_module_says_how_it_is_used(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 50


AVOIDED = re.compile(
    r"\b(nobody|everybody|anybody|whoever|licence|artefact|analyse|catalogue|centre|distil|fulfil|grey|whilst"
    r"|(?:behavio|colo|favo|flavo|hono|neighbo)ur\w*|(?:label|model|travel)led"
    r"|(?:general|initial|minim|maxim|normal|optim|orthogonal|quant|serial|summar|token|vector)is(?:e|ed|es|ing|ation))\b",
    re.IGNORECASE,
)


def test_the_documentation_is_in_american_english_and_names_its_subjects() -> None:
    names = ["Makefile", "Dockerfile", "docker-compose.yml", ".env.example", ".ci/run", "bench/LOG.md", "CHANGELOG.md"]
    found = [
        f"{file.name}: {match[0]}"
        for file in [*PAGES, *(REPO / name for name in names), *(REPO / "deploy").iterdir()]
        for match in AVOIDED.finditer(file.read_text())
    ]
    assert not found
    assert AVOIDED.findall("Whoever normalises colours, and a license") == ["Whoever", "normalises", "colours"]


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
