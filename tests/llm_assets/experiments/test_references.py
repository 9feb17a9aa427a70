from pathlib import Path

import pytest

from llm_assets.experiments.compose import compose
from llm_assets.experiments.references import resolve
from llm_assets.resources.hydra import HydraConfig
from model.errors import PipelineError


def test_the_names_of_experiments_become_the_folders_of_their_checkpoints():
    settings = resolve(compose("stdlib_chat"), lambda name: Path("/store") / name)
    assert settings.tokenizer.path == settings.training.init_from == "/store/stdlib"
    assert settings.training.distill_from == ""
    assert resolve(compose("stdlib_distilled"), Path).training.distill_from == "stdlib"


def test_a_folder_and_an_experiment_without_predecessors_stay_as_they_are():
    folder = compose("stdlib_chat", ["tokenizer.path=/a", "training.init_from=/b"])
    assert resolve(folder, pytest.fail) == folder
    assert resolve(compose("smoke"), pytest.fail) == compose("smoke")


def test_a_predecessor_that_is_not_there_is_one_line_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ASSETS_ARTIFACTS", str(tmp_path))
    with pytest.raises(
        PipelineError, match=r"no trained_checkpoint of experiment 'stdlib' in .*materialize it: dagster"
    ):
        HydraConfig().settings("stdlib_chat")


@pytest.mark.parametrize("option", ["tokenizer.path", "training.init_from", "training.distill_from"])
def test_the_error_of_a_missing_predecessor_names_the_option(option: str, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ASSETS_ARTIFACTS", str(tmp_path))
    kind = ["tokenizer=pretrained"] if option.startswith("tokenizer") else []
    resource = HydraConfig(overrides=[*kind, f"{option}=latest:stdlib"])
    with pytest.raises(
        PipelineError, match=f"^{option}=latest:stdlib: no trained_checkpoint of experiment 'stdlib' in"
    ):
        resource.settings("smoke")


@pytest.mark.parametrize("option", ["tokenizer.path", "training.init_from", "training.distill_from"])
def test_a_run_does_not_begin_with_the_checkpoint_that_it_replaces(option: str) -> None:
    kind = ["tokenizer=pretrained"] if option.startswith("tokenizer") else []
    with pytest.raises(
        PipelineError, match=f"{option} is 'latest:smoke', the checkpoint that a run of 'smoke'"
    ) as error:
        compose("smoke", [*kind, f"{option}=latest:smoke"])
    assert "\n" not in str(error.value)
