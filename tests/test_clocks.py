"""Durations and waits are measured with a clock that neither goes back nor jumps."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("llm_assets", "model", "bento", "bench")
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}


def misused(source: str) -> list[int]:
    """Lines on which the time of day is compared, subtracted, added to or kept under a name as it is."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        operands: list[ast.AST | None] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Add):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            operands = [node.value]
        found |= {part.lineno for part in operands if isinstance(part, ast.Call) and ast.unparse(part.func) in WALL}
    return sorted(found)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("started = time.time()", [1]),
        ("if time.time() > end: pass", [1]),
        ("left = end - time.time_ns()", [1]),
        ("age = datetime.now(UTC) - made", [1]),
        ("created = int(time.time())", []),
        ("created = datetime.now(UTC).isoformat()", []),
        ("started = time.monotonic()", []),
    ],
)
def test_a_duration_by_the_time_of_day_is_found(source: str, lines: list[int]) -> None:
    assert misused(source) == lines


def test_no_duration_and_no_wait_is_measured_by_the_time_of_day() -> None:
    found = {
        f"{path.relative_to(REPO)}:{line}"
        for package in PACKAGES
        for path in (REPO / package).rglob("*.py")
        for line in misused(path.read_text(encoding="utf-8"))
    }
    assert not found, f"{sorted(found)}: use time.monotonic(), or time.perf_counter()"
