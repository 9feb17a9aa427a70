"""A checkpoint's own code under the oldest supported release of transformers, the installed and the newest; an export's
layout, which is stock code, under the last of transformers 4, too.

`make releases` runs it under every minor release that is supported.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from model.build import build_config, build_model
from model.configuration_rex import KNOWN_TRANSFORMERS
from model.settings import ModelSettings
from model.weights.export import export_checkpoint
from tests.support.harness import needs_harness
from tests.support.tiny import ROTATIONS, TEXT, tiny_model, tiny_tokenizer

PROGRAM = Path(__file__).with_name("releases.py")
RELEASES = {"oldest": "transformers==5.0.0", "newest": "transformers<6"}
(MAJOR, START), (LAST, END) = KNOWN_TRANSFORMERS
assert MAJOR == LAST, "name the minor releases in between"
MINORS = {f"{MAJOR}.{minor}": f"transformers=={MAJOR}.{minor}.*" for minor in range(START, END + 1)}


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


def install(directory: Path, *packages: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command = [*pip, "--disable-pip-version-check", "--target", str(directory), *packages]
    subprocess.run(command, check=True, capture_output=True, text=True)


def install_release(directory: Path, release: str) -> None:
    """transformers, and those packages that it needs in another release than the one of this environment."""
    install(directory, release)
    (metadata,) = importlib.metadata.distributions(name="transformers", path=[str(directory)])
    needed = [Requirement(line) for line in metadata.requires or ()]
    others = [
        str(found)
        for found in needed
        if not found.marker and found.specifier and not found.specifier.contains(version(found.name), prereleases=True)
    ]
    if others:
        install(directory, *others)


def run(checkpoint: Path, directory: Path) -> tuple[str, dict[str, Any], str]:
    """Release, result of each attempt, other output; packages in `directory` shadow those of this environment."""
    done = run_with(directory, str(PROGRAM), str(checkpoint))
    assert done.returncode == 0, done.stderr[-2000:]
    release, found = json.loads(done.stdout.splitlines()[-1])
    return release, found, done.stderr


def run_with(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python in which the packages in `directory` shadow those of this environment, without this project."""
    # -S: without the startup files of site-packages, which put this project on the path.
    path = [str(directory), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    environment = {"PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def ours(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    release, found, said = run(checkpoint, tmp_path_factory.mktemp("ours"))
    assert release == transformers.__version__
    assert "was seen to work" not in said
    return found


@pytest.mark.processes
def test_our_release_gives_the_same_with_any_cache_rotates_as_told_and_refuses_an_argument_by_name(ours):
    assert ours["greedy"] == ours["without cache"] == ours["static cache"]
    assert len(set(ours["greedy"][0][9:])) > 4
    assert len(ours["pipeline"].split()) == 6
    default, linear, dynamic, llama3, yarn = ours["other rotations"]
    assert default == dynamic and len({default, linear, llama3, yarn, ours["logits"]}) == 5
    assert ours["unknown argument"] == "REX takes no argument 'no_such_argument'"


@pytest.mark.slow
@pytest.mark.processes
def test_transformers_4_computes_an_export_as_we_do_and_takes_its_tokenizer(tmp_path):
    tokenizer, ids_BT = tiny_tokenizer(), torch.arange(2, 82)[None]
    shapes = [{}, {"post_norm": False, "rope_theta": 50_000.0}, {"post_norm": False, "qk_norm": True}, *ROTATIONS]
    expected = []
    for number, shape in enumerate(shapes):
        model = tiny_model(tokenizer, **shape).eval()
        checkpoint, exported = tmp_path / f"checkpoint-{number}", tmp_path / f"export-{number}"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        export_checkpoint(checkpoint, exported)
        expected.append(model(ids_BT).logits.detach())
    install_release(tmp_path / "packages", "transformers==4.57.1")
    program = f"""
import torch, transformers
assert transformers.__version__ == "4.57.1"
for number in range({len(shapes)}):
    folder = "{tmp_path}/export-" + str(number)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)({TEXT!r})["input_ids"]
    logits = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(2, 82)[None]).logits
    torch.save((tokens, logits.detach()), folder + "/found.pt")
"""
    done = run_with(tmp_path / "packages", "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, logits in enumerate(expected):
        tokens, found = torch.load(tmp_path / f"export-{number}" / "found.pt")
        assert tokens == tokenizer(TEXT)["input_ids"]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.processes
def test_an_adapter_trains_merges_and_comes_back_from_its_files(ours):
    found = {name: value for name, value in ours["LoRA"].items() if name != "losses"}
    assert ours["LoRA"]["losses"][-1] < 0.8 * ours["LoRA"]["losses"][0]
    assert found == dict.fromkeys(["moved", "adapter loaded", "merged", "merged, loaded"], True)


@pytest.mark.processes
@needs_harness
def test_an_evaluation_harness_scores_the_checkpoint_as_we_do(ours):
    assert ours["lm-eval"]["equal ours"]
    assert len(set(ours["lm-eval"]["log-likelihoods"])) == 4
    assert ours["lm-eval"]["text"] == ours["pipeline"].split()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    "release",
    [
        *(pytest.param(release, id=name) for name, release in RELEASES.items()),
        *(pytest.param(release, id=name, marks=pytest.mark.nightly) for name, release in MINORS.items()),
    ],
)
def test_another_release_loads_and_generates_alike(release, ours, checkpoint, tmp_path):
    install_release(tmp_path, release)
    release, found, said = run(checkpoint, tmp_path)
    minor = tuple(map(int, release.split(".")[:2]))
    assert (minor <= KNOWN_TRANSFORMERS[1]) == ("was seen to work" not in said)
    assert found == ours
