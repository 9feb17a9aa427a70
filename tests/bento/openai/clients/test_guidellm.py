"""guidellm's load tool as it comes: it asks for the service's health first, then streams from several connections.

It pins other releases of click and multidict than this project has, so it lies in a folder of its own, with the
packages in `guidellm.txt`, those that differ from this environment's.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, on_a_port, running_service
from tests.e2e.workplace import BIN

pytestmark = [pytest.mark.processes, pytest.mark.slow]
PACKAGES = Path(__file__).with_name("guidellm.txt")
REQUESTS, STREAMS, TOKENS = 24, 8, 6
UNREACHED = re.compile(r"dns error|failed to lookup|[Cc]onnection refused|[Nn]etwork is unreachable|timed out")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """The folder with guidellm."""
    folder = tmp_path_factory.mktemp("guidellm")
    install = [
        BIN / "uv",
        "pip",
        "install",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        folder,
        "-r",
        PACKAGES,
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and (unreached := UNREACHED.search(done.stderr)):
        pytest.skip(f"the package index does not answer ({unreached[0]})")
    assert done.returncode == 0, done.stderr
    return folder


def test_guidellm_has_all_its_streams_answered(packages, tmp_path):
    prompts = [{"prompt": f"def f{number}", "output_tokens_count": TOKENS} for number in range(REQUESTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in prompts))
    with running_service(chat_template=CHAT_TEMPLATE) as service, on_a_port(service.app) as url:
        service.tokenizer.save_pretrained(tmp_path / "tokenizer")
        options = {
            "backend": f"kind=openai_http,target={url}",
            "tokenizer": f"kind=huggingface_auto,model={tmp_path / 'tokenizer'}",
            "profile": f"kind=concurrent,streams=[{STREAMS}]",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "data": f"kind=json_file,path={tmp_path / 'prompts.jsonl'}",
            "output": f"kind=json,path={tmp_path / 'report.json'}",
        }
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        answered = service.engine.stats().generated_tokens_total
    assert done.returncode == 0, done.stderr
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0), totals
    assert answered >= REQUESTS * TOKENS
