"""A pipeline that would train on a GPU which is not there ends before it makes a corpus."""

import pytest
import torch

from llm_assets.artifacts.store import ArtifactStore
from llm_assets.terminal.execute import check_settings
from model.errors import PipelineError

EXPERIMENT = "gpt2_124m"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One without artifacts and without a GPU."""
    monkeypatch.setenv("LLM_ASSETS_VAR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("overrides", [[], ["compute=torchrun", "compute.processes=2"]], ids=["local", "torchrun"])
def test_a_training_without_its_gpu_is_refused_at_once(overrides):
    with pytest.raises(PipelineError, match=r"training\.device is 'cuda': .* sees no GPU; set it to 'cpu' or 'auto'"):
        check_settings(EXPERIMENT, overrides)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["training.device=auto"], {}),
        ([], {"dry_run": True}),
        ([], {"job": "corpus_job"}),
        (["compute=ray"], {}),
    ],
    ids=["on what there is", "a dry run", "another job", "on a cluster"],
)
def test_what_needs_no_gpu_here_may_start(overrides, options):
    check_settings(EXPERIMENT, overrides, **options)


def test_an_experiment_with_a_checkpoint_may_start_for_what_comes_after_it(monkeypatch):
    asked = []
    monkeypatch.setattr(ArtifactStore, "latest_manifest", lambda store, *wanted: asked.append(wanted) or object())
    check_settings(EXPERIMENT, [])
    assert asked == [("trained_checkpoint", EXPERIMENT)]
