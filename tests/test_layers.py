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
    foreign = re.compile(r"dagster|bentoml|mlflow|\bmateriali[sz]e", re.IGNORECASE)
    lines = {
        f"{path.relative_to(REPO)}:{number}: {line.strip()}"
        for path in (REPO / "model").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if foreign.search(line)
    }
    assert not lines


@pytest.mark.processes
def test_loading_the_definitions_loads_no_heavy_package():
    program = "import sys, json, llm_assets.definitions as d; d.defs(); "
    program += f"print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_no_source_file_is_longer_than_one_idea():
    long = {str(path.relative_to(REPO)): count for room in (*FORBIDDEN, "tests") for path in (REPO / room).rglob("*.py")
            if (count := len(path.read_text().splitlines())) > 500}  # fmt: skip
    assert not long


def test_no_folder_shows_more_files_than_a_person_takes_in():
    """About a dozen: beyond fourteen, a folder has a subject of its own in it."""
    kinds = {".py", ".cpp", ".h", ".yaml", ".md", ".png", ".json", ".txt"}
    crowded = {}
    for room in (*FORBIDDEN, "configs", "deploy", "docs", "tests"):
        for folder in (REPO / room, *(path for path in (REPO / room).rglob("*") if path.is_dir())):
            files = [path for path in folder.iterdir() if path.suffix in kinds]
            if len(files) > 14:
                crowded[str(folder.relative_to(REPO))] = len(files)
    assert not crowded


def imported_files(path: Path, modules: dict[str, Path]) -> set[Path]:
    """The project's files that a file imports, inside functions too; imports for types alone are left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module if not node.level else f"{'.'.join(path.relative_to(REPO).parent.parts)}.{node.module}"
            # `from package import module` imports the module, `from module import name` the module that has the name.
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
    return {modules[name] for name in names if name in modules} - {path}


def circles(graph: dict) -> list[list[str]]:
    """The groups of nodes that reach each other, by repeated search from each node."""

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for following in graph.get(waiting.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in graph}
    return sorted(sorted(str(node) for node in group) for group in groups if group)


def import_graph() -> dict[Path, set[Path]]:
    files = [path for package in FORBIDDEN for path in (REPO / package).rglob("*.py")]
    modules = {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {path: imported_files(path, modules) for path in files}


def test_no_files_import_each_other_in_a_circle():
    graph = import_graph()
    assert sum(map(len, graph.values())) > 300
    assert circles(graph) == []


def test_no_folders_import_each_other_in_a_circle():
    folders: dict[Path, set[Path]] = {}
    for path, imported in import_graph().items():
        folders.setdefault(path.parent, set()).update(found.parent for found in imported if found.parent != path.parent)
    # A package's own files stand above and below its folders (settings below, the door above): only folders count.
    packages = {REPO / package for package in FORBIDDEN}
    inner = {folder: imported - packages for folder, imported in folders.items() if folder not in packages}
    assert circles(inner) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
