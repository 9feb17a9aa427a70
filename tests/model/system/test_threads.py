"""Every stage that computes with torch keeps to the CPU quota of its container."""

from pathlib import Path

import pytest
import torch

from model.build import build_config, build_model
from model.evaluation import compare, evaluate
from model.quantization import quantize_checkpoint
from model.settings import QuantizationSettings
from model.system import cpu
from model.system.cpu import limit_threads
from model.text import tokens
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset, build_tokenized_dataset
from model.training.train import train
from tests.model.training.tiny import TOKENIZER, experiment, make_dataset

CONFIG = build_config(experiment().model, TOKENIZER.vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=1)


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def four_threads_and_a_quota_of_one_and_a_half_cores(dataset_dir, tmp_path, monkeypatch):
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(cpu, "CGROUP", tmp_path / "cgroup")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.medium
def test_training_keeps_to_the_quota(dataset_dir, tmp_path):
    seen: list[int] = []
    train(
        experiment(max_steps=2, eval_steps=2, save_steps=2, logging_steps=1),
        dataset_dir,
        tmp_path / "output",
        tmp_path / "scratch",
        on_metrics=lambda step, values: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {1}


def test_evaluation_keeps_to_the_quota(dataset_dir):
    model, dataset = build_model(CONFIG, seed=0), TokenDataset(dataset_dir, "validation", TOKENIZER.sequence_length)
    evaluate(model, dataset, max_windows=1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(4)
    compare(model, model, dataset, max_windows=1)
    assert torch.get_num_threads() == 1


@pytest.mark.processes
@pytest.mark.slow
def test_quantization_keeps_to_the_quota(dataset_dir, tmp_path):
    build_model(CONFIG, seed=0).save_pretrained(tmp_path / "checkpoint")
    load_tokenizer(dataset_dir / "tokenizer").save_pretrained(tmp_path / "checkpoint")
    settings = QuantizationSettings(method="none", evaluation_windows=1)
    quantize_checkpoint(
        settings, tmp_path / "checkpoint", dataset_dir, tmp_path / "out", sequence_length=TOKENIZER.sequence_length
    )
    assert torch.get_num_threads() == 1


def test_tokenizing_keeps_to_the_quota(dataset_dir, tmp_path, monkeypatch):
    pools: list[int] = []

    class Pool(tokens.ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(tokens, "ThreadPoolExecutor", Pool)
    build_tokenized_dataset(TOKENIZER, dataset_dir.parent / "corpus", tmp_path / "dataset")
    assert torch.get_num_threads() == 1
    assert pools == [1, 1]


def test_a_number_of_threads_below_the_quota_stays(monkeypatch):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)
    torch.set_num_threads(2)
    assert limit_threads() == 2
    torch.set_num_threads(4)
    assert limit_threads() == torch.get_num_threads() == 3
