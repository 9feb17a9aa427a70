"""The README's first commands as they stand: what `make pipeline` made, `make serve` serves, and curl gets text."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.workplace import REPO, Workplace, free_port, wait_for
from tests.support.documented import blocks, commands

pytestmark = pytest.mark.e2e


def test_the_first_commands_of_the_readme_end_in_text(smoke: Workplace, tmp_path: Path) -> None:
    start, _, request = blocks(REPO / "README.md", "sh")[:3]
    _, (program, *arguments) = commands(start)  # the first one made `smoke`
    assert [program, *arguments] == ["make", "serve", "EXPERIMENT=smoke"]
    port, log = free_port(), tmp_path / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            smoke.make(*arguments, f"PORT={port}"),
            cwd=REPO,
            env=smoke.env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", process, log)
        asked = request.replace("127.0.0.1:3000", f"127.0.0.1:{port}")
        done = subprocess.run(["bash", "-e", "-c", asked], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 and '"generated_tokens"' in done.stdout, done.stdout + done.stderr
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(120)
