"""The one run of the whole `smoke` pipeline that the end-to-end tests share."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

from llm_assets.resources import tracking_database
from tests.e2e.workplace import REPO, Workplace, new_workplace
from tests.support.documented import blocks, commands


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Workplace:
    """The whole `smoke` pipeline, once for all tests, through the README's first command.

    Each process of pytest-xdist has a copy of the run: what its tests do next is not seen by the others.
    """
    root = tmp_path_factory.mktemp("smoke")
    if not hasattr(request.config, "workerinput"):
        return _run(new_workplace(root))
    shared = tmp_path_factory.getbasetemp().parent / "smoke"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            made = shared.with_suffix(".made")
            shutil.rmtree(made, ignore_errors=True)  # of a process that failed
            _run(new_workplace(made))
            made.rename(shared)
        shutil.copytree(shared, root, symlinks=True, dirs_exist_ok=True)
    copy = Workplace(root, root / "bentoml")
    tracking_database.prepare(copy.var / "mlflow.db")  # as each command does first in a folder that was copied
    return copy


def _run(workplace: Workplace) -> Workplace:
    program, *arguments = next(commands(blocks(REPO / "README.md", "sh")[0]))
    assert [program, *arguments] == ["make", "pipeline", "EXPERIMENT=smoke"]
    result = subprocess.run(
        workplace.make(*arguments),
        cwd=REPO,
        env=workplace.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    Path(workplace.root, "pipeline.log").write_text(result.stdout)
    return workplace
