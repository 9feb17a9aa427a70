"""docs/architecture.md lists the internals of other packages in use, and the installed releases have them."""

import ast
import functools
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from llm_assets.containers.packages import pinned
from model.training.trainer import RexTrainer

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "bento", "llm_assets", "bench")
OWNERS = {"Trainer": Trainer, "TrainingArguments": TrainingArguments, "PreTrainedConfig": PreTrainedConfig}


def table() -> list[tuple[str, str, set[str]]]:
    """The rows of the page: package with version, internals, files."""
    text = (REPO / "docs" / "architecture.md").read_text().split("## Where this project relies on internals")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and " | " in line][1:]
    return [(package, names, set(re.findall(r"`([^`]+)`", files))) for package, names, files in rows]


def listed(owner: str) -> set[str]:
    return {name for _, names, _ in table() for name in re.findall(rf"`{owner}\.(_\w+)`", names)}


@functools.cache
def attributes(path: Path) -> set[str]:
    """Private attributes that a file reads or sets."""
    return {node.attr for node in nodes(path) if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in (REPO / package).rglob("*.py")]


def in_source_of(kind: type, name: str) -> bool:
    """Whether the release knows `name`: as a method, a field, or an attribute that a method sets."""
    return hasattr(kind, name) or re.search(rf"\bself\.{name}\b", inspect.getsource(kind)) is not None


@pytest.mark.parametrize("owner", OWNERS)
def test_the_installed_transformers_has_every_private_name_that_is_listed(owner: str) -> None:
    assert listed(owner)
    assert [name for name in sorted(listed(owner)) if not in_source_of(OWNERS[owner], name)] == []


def test_no_private_method_of_the_trainer_is_overridden_without_being_listed() -> None:
    own = {name for name in vars(RexTrainer) if re.match("_[a-z]", name)}
    overridden = {name for name in own if hasattr(Trainer, name)}
    assert overridden == {name for name in listed("Trainer") if hasattr(Trainer, name)}


@pytest.mark.parametrize("owner", OWNERS)
def test_the_private_names_of_transformers_are_used_in_the_files_that_are_listed_and_in_no_others(owner: str) -> None:
    names = listed(owner)
    overridden = {name for name in names if name in vars(RexTrainer)}
    using = {str(path.relative_to(REPO)) for path in sources() if attributes(path) & names}
    files = {file for _, row, given in table() if f"`{owner}." in row for file in given}
    assert using == files
    used = set().union(*(attributes(REPO / file) for file in files))
    assert names - overridden <= used


def test_no_private_attribute_of_the_trainer_is_used_without_being_listed() -> None:
    # Attributes that the Trainer's own code sets, as far as RexTrainer does not define them itself.
    theirs = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(Trainer)))
    for file in ("model/training/trainer.py", "model/training/arguments.py"):
        assert attributes(REPO / file) & theirs <= listed("Trainer") | listed("TrainingArguments")


def test_private_attributes_of_trainer_and_subclass_do_not_collide() -> None:
    theirs = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(Trainer))) | set(dir(Trainer))
    ours = set(re.findall(r"\bself\.(_[a-z]\w*)(?:: [^=]+)? =", inspect.getsource(RexTrainer)))
    assert ours & theirs <= listed("Trainer")


@pytest.mark.parametrize(
    ("private", "package"),
    [(r"dagster\w*\._", "Dagster"), (r"bentoml\._|_bentoml", "BentoML"), (r"uvicorn\.protocols", "uvicorn")],
    ids=str,
)
def test_private_modules_are_imported_in_the_one_file_that_is_listed(private: str, package: str) -> None:
    using = set()
    for path in sources():
        for node in nodes(path):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(re.match(private, module) for module in modules):
                using.add(str(path.relative_to(REPO)))
    (files,) = [given for name, _, given in table() if name.startswith(package)]
    assert using == files and len(files) == 1


@pytest.mark.parametrize("file", ["llm_assets/instance/run_launcher.py", "bento/bentoml_internals.py"])
def test_the_file_of_private_modules_lists_the_names_that_it_imports(file: str) -> None:
    tree = ast.parse((REPO / file).read_text())
    described = ast.get_docstring(tree) or ""
    private = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "._" in (node.module or "")
    ]  # fmt: skip
    assert private
    assert [alias.name for node in private for alias in node.names if alias.name not in described] == []


def test_the_versions_seen_to_work_are_the_pinned_ones() -> None:
    versions = dict(line.split("==") for line in pinned((REPO / "constraints.txt").read_text()))
    for package, _, _ in table():
        name, version = package.lower().split()
        assert versions[name] == version, f"{name}: test the pinned release and put it in docs/architecture.md"


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text())
    loaded["on"] = loaded.pop(True)  # YAML 1.1 reads the key `on` so
    return loaded


def test_a_weekly_job_runs_the_fast_tests_with_the_newest_release_of_each_of_these_packages() -> None:
    crons = [entry["cron"] for entry in workflow()["on"]["schedule"]]
    newest = workflow()["jobs"]["newest"]
    (weekly,) = [cron for cron in crons if f"github.event.schedule == '{cron}'" in newest["if"]]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly)
    packages = " ".join(newest["strategy"]["matrix"]["package"]).split()
    assert {package.lower().split()[0] for package, _, _ in table()} <= set(packages)
    commands = [step.get("run", "") for step in newest["steps"]]
    assert any("--upgrade ${{ matrix.package }}" in command for command in commands)
    assert any("make coverage" in command for command in commands)


def test_every_job_of_the_workflow_calls_what_the_repository_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for job in workflow()["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] and job["steps"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(" ".join(re.findall(r"\bmake((?: [a-z-]+)+)", step.get("run", ""))).split()) <= targets
            assert all((REPO / script).is_file() for script in re.findall(r"^\.ci/\w+", step.get("run", "")))


def test_the_installed_mlflow_starts_its_server_by_the_name_that_is_listed() -> None:
    (names,) = [names for package, names, _ in table() if package.startswith("MLflow")]
    assert "`mlflow.server._exec_cmd`" in names
    spec = importlib.util.find_spec("mlflow")
    assert spec and spec.origin
    assert "= _exec_cmd(\n" in (Path(spec.origin).parent / "server" / "__init__.py").read_text()
