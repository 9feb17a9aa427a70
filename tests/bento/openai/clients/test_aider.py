"""aider's real program edits a file with the service's answer, and knows a conversation that is too long.

It pins a hundred packages in other releases than this project's, so it has a separate environment: `make aider`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, on_a_port, running_service
from tests.e2e.workplace import REPO

PYTHON = REPO / ".venv-aider/bin/python"
pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON.exists(), reason="no aider: `make aider` makes its environment"),
]
BEFORE, AFTER = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"
FILE = "calc.py"
ROOM_FOR_ITS_PROMPTS = 16_384
SCARCE = 512


def run_aider(folder: Path, url: str, *options: str) -> str:
    """What aider prints about one message, without a terminal. The model may only answer with the right edit."""
    home = folder / "home"
    prices = home / ".aider/caches/model_prices_and_context_window.json"  # else it asks another host for them
    prices.parent.mkdir(parents=True)
    prices.write_text(json.dumps({"unrelated": {}}))
    forced = {"extra_body": {"structured_outputs": {"choice": [f"{FILE}\n```\n{AFTER}```\n"]}}}
    settings = folder / "settings.yml"
    settings.write_text(json.dumps([{"name": f"openai/{MODEL}", "edit_format": "whole", "extra_params": forced}]))
    (folder / FILE).write_text(BEFORE)
    command = [PYTHON, "-m", "aider", "--model", f"openai/{MODEL}", "--model-settings-file", settings]
    command += ["--no-git", "--yes-always", "--no-analytics", "--no-check-update", "--no-show-release-notes"]
    command += [
        "--no-show-model-warnings",
        "--no-pretty",
        "--map-tokens",
        "0",
        "--message",
        "Mend add.",
        *options,
        FILE,
    ]
    environment = {**os.environ, "HOME": str(home), "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_aider_edits_a_file_with_the_answer(tmp_path, options):
    room = ROOM_FOR_ITS_PROMPTS
    with running_service(chat_template=CHAT_TEMPLATE, context=room) as service, on_a_port(service.app) as url:
        said = run_aider(tmp_path, url, *options)
    assert (tmp_path / FILE).read_text() == AFTER, said
    assert f"Applied edit to {FILE}" in said


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_aider_knows_a_conversation_that_is_too_long(tmp_path, options):
    with running_service(chat_template=CHAT_TEMPLATE, context=SCARCE) as service, on_a_port(service.app) as url:
        said = run_aider(tmp_path, url, *options)
    assert "has hit a token limit" in said and "possibly exhausted context window" in said
    assert (tmp_path / FILE).read_text() == BEFORE
