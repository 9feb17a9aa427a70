"""Preference tuning through trl on a REX checkpoint as it comes."""

import json
from pathlib import Path

import pytest
import torch

from model.errors import PipelineError
from model.settings import TrainingSettings
from model.text.tokenizer import load_tokenizer
from model.training.preference.tuning import checkpoint_key, tune_preferences
from model.training.train import train
from model.weights.loading import load_model
from tests.model.training.optim.test_optimizer import make_model
from tests.model.training.tiny import experiment


@pytest.fixture(scope="module")
def base(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(experiment(max_steps=4, sample_tokens=0), dataset_dir, folder / "out", folder / "scratch")
    return folder / "out"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"def f{number}(", "chosen": "self):\n    return None", "rejected": "import import"}
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_probability(model_dir: Path, prompt: str, answer: str) -> float:
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    asked, answered = (tokenizer(text).input_ids for text in (prompt, answer))
    log_p_TV = model(torch.tensor([asked + answered])).logits[0].log_softmax(-1)
    return sum(log_p_TV[len(asked) + at - 1, token].item() for at, token in enumerate(answered))


@pytest.mark.medium
@pytest.mark.parametrize(("lora_rank", "precision", "device"), [(0, "float32", "cpu"), (4, "bfloat16", "auto")])
def test_the_chosen_answers_become_likelier_than_the_rejected_and_the_checkpoint_is_plain(
    base, pairs, dataset_dir, tmp_path, lora_rank, precision, device
):
    options = {"learning_rate": 5e-3, "max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 6}
    options |= {"precision": precision, "device": device}
    settings = experiment(init_from=str(base), preferences=[str(pairs)], lora_rank=lora_rank, **options)
    seen: list[tuple[int, dict[str, float]]] = []
    lines: list[str] = []

    def see(step: int, metrics: dict[str, float]) -> None:
        seen.append((step, metrics))

    found = tune_preferences(
        settings, dataset_dir, tmp_path / "out", tmp_path / "scratch", log=lines.append, on_metrics=see
    )
    assert found.preferences["pairs"] + found.preferences["held_out_pairs"] == 60
    assert found.preferences["held_out_preference_accuracy"] == 1
    assert found.preferences["held_out_preference_margin"] > 0
    assert seen[0][1]["loss"] > seen[-1][1]["loss"]
    assert seen[-1][0] == found.steps == 12

    def gain(answer: str) -> float:
        return log_probability(tmp_path / "out", "def g(", answer) - log_probability(base, "def g(", answer)

    assert gain("self):\n    return None") > gain("import import") + 0.1
    before, after = load_model(base), load_model(tmp_path / "out")
    assert [name for name, _ in before.named_parameters()] == [name for name, _ in after.named_parameters()]
    assert after.config.to_dict() == before.config.to_dict()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["preferences"] == found.preferences
    again = tune_preferences(settings, dataset_dir, tmp_path / "again", tmp_path / "scratch", log=lines.append)
    assert again.resumed_from_step == 12
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.medium
def test_a_tuning_shorter_than_its_interval_of_log_lines_logs_its_last_step(base, pairs, dataset_dir, tmp_path):
    options = {"max_steps": 3, "logging_steps": 10, "save_steps": 2, "per_device_train_batch_size": 4}
    settings = experiment(init_from=str(base), preferences=[str(pairs)], **options)
    seen: list[int] = []
    found = tune_preferences(
        settings,
        dataset_dir,
        tmp_path / "out",
        tmp_path / "scratch",
        on_metrics=lambda step, metrics: seen.append(step),
    )
    again = tune_preferences(settings, dataset_dir, tmp_path / "again", tmp_path / "scratch")
    assert seen == [2, 3]
    assert again.resumed_from_step == again.steps == 3 and again.train_loss == found.train_loss > 0
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_pairs_and_other_initial_weights_do_not_resume_a_tuning():
    pairs = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    model = make_model()
    key = checkpoint_key(model, pairs)
    assert checkpoint_key(make_model(), pairs) == key
    assert checkpoint_key(model, [{**pairs[0], "chosen_ids": [4]}]) != key
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert checkpoint_key(model, pairs) != key


def test_preferences_without_initial_weights_and_too_few_of_them_are_refused(base, dataset_dir, tmp_path):
    with pytest.raises(
        PipelineError, match=r"training.preferences is \['a'\]: expected none without training.init_from"
    ):
        TrainingSettings(preferences=["a"])
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    settings = experiment(init_from=str(base), preferences=[str(path)])
    with pytest.raises(PipelineError, match=r"holds \d pairs to train on: expected at least one batch \(2\)"):
        tune_preferences(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch")
