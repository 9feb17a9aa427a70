"""The README's first commands as they stand: what `make pipeline` made, `make serve` serves, and curl gets text."""

import subprocess
from pathlib import Path

import pytest

from tests.e2e.workplace import REPO, Workplace, free_port, started
from tests.support.documented import blocks, commands

pytestmark = pytest.mark.e2e


def test_the_first_commands_of_the_readme_end_in_text(smoke: Workplace, tmp_path: Path) -> None:
    start, _, request = blocks(REPO / "README.md", "sh")[:3]
    _, (program, *arguments) = commands(start)  # the first one made `smoke`
    assert [program, *arguments] == ["make", "serve", "EXPERIMENT=smoke"]
    port, log = free_port(), tmp_path / "serve.log"
    with started(smoke.make(*arguments, f"PORT={port}"), smoke, f"http://127.0.0.1:{port}/readyz", log):
        asked = request.replace("127.0.0.1:3000", f"127.0.0.1:{port}")
        done = subprocess.run(["bash", "-e", "-c", asked], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 and '"generated_tokens"' in done.stdout, done.stdout + done.stderr
