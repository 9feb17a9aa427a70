"""A checkpoint's own code under the oldest supported release of transformers, the installed and the newest."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.build import build_config, build_model
from model.configuration_rex import KNOWN_TRANSFORMERS
from model.settings import ModelSettings

PROGRAM = Path(__file__).with_name("releases.py")
# What pip installs beside each, where ours is too new or too old for it.
OLDEST = ("transformers==5.0.0", "tokenizers==0.22.2", "huggingface_hub==1.3.0")
NEWEST = ("transformers<6",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied and with large weights, so that a wrong position or cache changes the tokens."""
    shape = ModelSettings(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = build_model(build_config(shape, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    return directory


def run(checkpoint: Path, directory: Path, packages: tuple[str, ...] = ()) -> tuple[str, dict[str, Any], str]:
    """Release, result of each attempt, other output; `packages` shadow those of this environment."""
    if packages:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), *packages]
        subprocess.run([*pip, "--disable-pip-version-check"], check=True, capture_output=True, text=True)
    # -S: without the startup files of site-packages, which put this project on the path.
    path = [str(directory), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    environment = {"PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", str(PROGRAM), str(checkpoint)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    release, found = json.loads(done.stdout.splitlines()[-1])
    return release, found, done.stderr


@pytest.fixture(scope="module")
def ours(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    release, found, said = run(checkpoint, tmp_path_factory.mktemp("ours"))
    assert release == transformers.__version__
    assert "was seen to work" not in said
    return found


@pytest.mark.processes
def test_our_release_gives_the_same_with_any_cache_and_refuses_an_argument_by_name(ours):
    assert ours["greedy"] == ours["without cache"] == ours["static cache"]
    assert len(set(ours["greedy"][0][9:])) > 4
    assert len(ours["pipeline"].split()) == 6
    assert ours["unknown argument"] == "REX takes no argument 'no_such_argument'"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("packages", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_another_release_loads_and_generates_alike(packages, ours, checkpoint, tmp_path):
    release, found, said = run(checkpoint, tmp_path, packages)
    minor = tuple(map(int, release.split(".")[:2]))
    assert (minor <= KNOWN_TRANSFORMERS[1]) == ("was seen to work" not in said)
    assert found == ours
