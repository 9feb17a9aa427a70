"""The documentation's examples of the service, run as they stand against a real `bentoml serve`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bento.running_service import save_long_model, serve
from tests.e2e.workplace import REPO

pytestmark = pytest.mark.e2e


def examples(language: str) -> list[str]:
    section = (REPO / "docs" / "serving.md").read_text().split("\n## Routes\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_service_work(tmp_path: Path):
    (tmp_path / "model").mkdir()
    save_long_model(tmp_path / "model")
    with serve(tmp_path, tmp_path / "model") as server:
        commands = [["bash", "-e", "-c", example] for example in examples("sh")]
        programs = [[sys.executable, "-c", example] for example in examples("python")]
        assert commands and programs
        for command in [*commands, *programs]:
            here = [part.replace("http://127.0.0.1:3000", server.url) for part in command]
            done = subprocess.run(here, check=False, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() and '"error"' not in done.stdout, done.stdout
