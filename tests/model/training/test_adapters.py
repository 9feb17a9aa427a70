"""LoRA through peft on a REX checkpoint: resumed, merged, quantized and exported as any other training."""

from pathlib import Path

import pytest
import torch

from model.errors import PipelineError
from model.settings import TrainingSettings
from model.training import adapters
from model.training.adapters import add_adapters, merge_adapters
from model.training.train import train
from model.weights.loading import load_model
from tests.model.training.optim.test_optimizer import make_model
from tests.model.training.tiny import assert_resumes_bit_exact, experiment

LORA = TrainingSettings(lora_rank=4, init_from="somewhere")


@pytest.fixture(scope="module")
def base(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(experiment(max_steps=4, sample_tokens=0), dataset_dir, folder / "out", folder / "scratch")
    return folder / "out"


def test_adapters_change_nothing_at_first_and_only_they_are_trained():
    model, ids_BT = make_model(), torch.arange(24)[None]
    before = model(ids_BT).logits
    add_adapters(model, LORA)
    torch.testing.assert_close(model(ids_BT).logits, before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2  # layers, projections, A and B
    assert all("lora_" in name for name in names)


def test_merged_adapters_compute_the_same_and_leave_a_plain_model():
    model, ids_BT = make_model(), torch.arange(24)[None]
    names = set(model.state_dict())
    add_adapters(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    tuned = model(ids_BT).logits
    merge_adapters(model)
    torch.testing.assert_close(model(ids_BT).logits, tuned, atol=1e-5, rtol=1e-4)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.medium
@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_training_of_adapters_resumes_bit_exact_and_ends_as_a_plain_checkpoint(base, dataset_dir, tmp_path, optim):
    settings = experiment(init_from=str(base), lora_rank=4, optim=optim, sample_tokens=0)
    summary = train(settings, dataset_dir, tmp_path / "whole", tmp_path / "a")
    assert not [line for line in summary.warnings if "unchanged" in line]  # frozen weights cause no warning
    assert_resumes_bit_exact(settings, dataset_dir, tmp_path)

    before, after = load_model(base), load_model(tmp_path / "whole")
    assert [name for name, _ in before.named_parameters()] == [name for name, _ in after.named_parameters()]
    for name, old in before.named_parameters():
        new = after.get_parameter(name)
        assert torch.equal(old, new) != name.endswith("_proj.weight"), name
        if name.endswith("_proj.weight"):
            assert torch.linalg.matrix_rank((new - old).double(), rtol=1e-4) <= 4, name
    assert load_model(tmp_path / "whole", quantized=True)(torch.arange(24)[None]).logits.isfinite().all()


def test_adapters_without_initial_weights_or_without_peft_are_refused(monkeypatch):
    with pytest.raises(PipelineError, match=r"training.lora_rank is 4: expected none without training.init_from"):
        TrainingSettings(lora_rank=4)
    monkeypatch.setattr(adapters, "find_spec", lambda package: None)
    with pytest.raises(PipelineError, match=r"training.lora_rank needs peft, .*pip install -e '\.\[finetune\]'"):
        add_adapters(make_model(), LORA)
