"""The layers hold: what may import what, and what the code location must not load."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "model": {"llm_assets", "bento", "bench", "dagster", "dagster_mlflow", "hydra", "omegaconf", "mlflow", "bentoml"},
    "bench": {"llm_assets", "bento", "dagster", "mlflow", "bentoml"},
    "bento": {"llm_assets", "bench", "dagster", "mlflow", "hydra", "omegaconf"},
    "llm_assets": {"bento"},
}
HEAVY = {"torch", "transformers", "mlflow", "bentoml", "datasets", "matplotlib"}


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_imports_only_what_lies_below_it(package):
    files = sorted((REPO / package).rglob("*.py"))
    assert files
    crossings = {str(path.relative_to(REPO)): imported_packages(path) & FORBIDDEN[package] for path in files}
    assert not {path: names for path, names in crossings.items() if names}


def test_the_model_speaks_of_no_orchestrator_tracker_or_server():
    foreign = re.compile(r"dagster|bentoml|mlflow|materiali[sz]e", re.IGNORECASE)
    lines = {
        f"{path.relative_to(REPO)}:{number}: {line.strip()}"
        for path in (REPO / "model").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if foreign.search(line)
    }
    assert not lines


def test_loading_the_definitions_loads_no_heavy_package():
    program = f"import sys, json, llm_assets.definitions as d; d.defs(); print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_no_source_file_is_longer_than_one_idea():
    long = {str(path.relative_to(REPO)): count for package in FORBIDDEN for path in (REPO / package).rglob("*.py")
            if (count := len(path.read_text().splitlines())) > 500}  # fmt: skip
    assert not long
