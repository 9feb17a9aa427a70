"""The one run of the whole `smoke` pipeline that the end-to-end tests share."""

import subprocess

import pytest

from tests.e2e.workplace import REPO, Workplace, new_workplace
from tests.support.documented import blocks, commands


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Workplace:
    """The whole `smoke` pipeline, once for all tests, through the README's first command."""
    workplace = new_workplace(tmp_path_factory.mktemp("smoke"))
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
    (workplace.root / "pipeline.log").write_text(result.stdout)
    return workplace
