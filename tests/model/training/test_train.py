import json
import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.errors import PipelineError
from model.evaluation import evaluate
from model.modeling_rex import RexForCausalLM
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.training import loss, trainer
from model.training.checkpoints import local as checkpoints
from model.training.optim.optimizer import MuonAdamW, parameter_groups
from model.training.outputs.files import TIMING_FIELDS
from model.training.outputs.summary import TrainingSummary
from model.training.train import train
from tests.model.training.tiny import TOKENIZER, experiment

pytestmark = pytest.mark.medium

Run = tuple[Path, TrainingSummary, list[tuple[int, dict[str, float]]], list[str]]


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("run")
    metrics: list[tuple[int, dict[str, float]]] = []
    lines: list[str] = []
    summary = train(
        experiment(max_steps=40, eval_steps=20),
        dataset_dir,
        directory / "output",
        directory / "scratch",
        log=lines.append,
        on_metrics=lambda step, values: metrics.append((step, values)),
    )
    return directory / "output", summary, metrics, lines


def test_the_loss_falls_on_real_text(run):
    _, summary, metrics, _ = run
    validation = [(step, values["eval_loss"]) for step, values in metrics if "eval_loss" in values]
    assert validation[0] == (0, pytest.approx(math.log(300), abs=0.2))
    assert validation[-1][0] == summary.steps == 40
    assert validation[-1][1] < validation[0][1] - 1
    assert summary.train_loss < validation[0][1] - 1


def test_every_log_reaches_the_caller_and_the_curves(run):
    output, _, metrics, lines = run
    curve = json.loads((output / "curves.json").read_text())
    assert curve == [
        {"step": step, **{k: v for k, v in values.items() if k not in TIMING_FIELDS}} for step, values in metrics
    ]
    training = [values for _, values in metrics if "loss" in values]
    live = {"tokens_per_second", "model_flops_per_second", "model_flops_utilization", "peak_memory_bytes", "seconds"}
    assert {"loss", "learning_rate", "grad_norm"} | live == set(training[0])
    assert 0 < training[-1]["model_flops_utilization"] < 1
    assert any("bits per byte" in line for line in lines)
    assert any("tokens/s" in line and "left" in line for line in lines)


def test_the_output_is_a_checkpoint_with_everything_beside_it(run, dataset_dir):
    output, summary, _, _ = run
    weights = load_file(output / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in weights.values()) == summary.parameters
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rex.RexForCausalLM"
    tokenizer = load_tokenizer(output)
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    for name in ("configuration_rex.py", "modeling_rex.py"):
        assert (output / name).read_bytes() == Path(trainer.__file__).parents[1].joinpath(name).read_bytes()
    assert json.loads((output / "summary.json").read_text())["bits_per_byte"] == summary.bits_per_byte
    assert json.loads((output / "samples.json").read_text()) == summary.samples
    assert f"{summary.bits_per_byte:.4f}" in (output / "README.md").read_text()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_weights_score_what_the_summary_says(run, dataset_dir):
    output, summary, _, _ = run
    model = RexForCausalLM.from_pretrained(output)
    result = evaluate(model, TokenDataset(dataset_dir, "validation", TOKENIZER.sequence_length))
    assert result.loss == pytest.approx(summary.validation_loss, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(summary.bits_per_byte, rel=1e-6)


def test_the_best_weights_are_kept_when_later_ones_are_worse(dataset_dir, tmp_path, monkeypatch):
    class Worsening(MuonAdamW):
        def step(self, closure=None):
            super().step()
            if self.param_groups[0]["lr"] < experiment().training.learning_rate / 2:  # in the decay
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.neg_()

    monkeypatch.setattr(
        trainer, "build_optimizer", lambda model, settings, precision: Worsening(parameter_groups(model, settings))
    )
    summary = train(experiment(max_steps=31, eval_steps=15), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    curve = json.loads((tmp_path / "output" / "curves.json").read_text())
    scores = {entry["step"]: entry["eval_loss"] for entry in curve if entry.get("eval_loss") and entry["step"]}
    assert summary.best_step == min(scores, key=scores.__getitem__) < summary.steps


def test_accumulated_gradients_equal_one_large_batch(dataset_dir, tmp_path):
    curves = []
    for size, accumulation in ((4, 1), (1, 4)):
        settings = experiment(
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            seed=3,
        )
        settings.model.attention_dropout = 0.0
        train(settings, dataset_dir, tmp_path / f"output{size}", tmp_path / f"scratch{size}")
        curves.append(json.loads((tmp_path / f"output{size}" / "curves.json").read_text()))
    compared = {"loss", "grad_norm", "eval_loss"}
    assert compared <= {key for entry in curves[0] for key in entry}
    for large, accumulated in zip(*curves, strict=True):
        assert accumulated.keys() == large.keys()
        for key in large.keys() & compared:
            assert accumulated[key] == pytest.approx(large[key], rel=1e-4)


def test_an_absurd_learning_rate_stops_the_run_before_anything_is_saved(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "warmup_stable_decay", lambda step, **schedule: 1e40)  # the options allow at most 100
    settings = experiment()
    with pytest.raises(
        PipelineError,
        match=r"is (nan|inf) at step \d+.*: .* no checkpoint was written yet; lower training.learning_rate",
    ):
        train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert not (tmp_path / "output").exists()


def test_poisoned_weights_stop_the_run_and_the_last_good_checkpoint_stays(dataset_dir, tmp_path, monkeypatch):
    class Poisoned(MuonAdamW):
        steps = 0

        def step(self, closure=None):
            super().step()
            self.steps += 1
            if self.steps == 6:
                self.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(
        trainer, "build_optimizer", lambda model, settings, precision: Poisoned(parameter_groups(model, settings))
    )
    scratch = tmp_path / "scratch"
    with pytest.raises(
        PipelineError,
        match=rf"training loss is nan at step 7 on documents \d+.* of the train split: .*{scratch}/checkpoint-5; lower",
    ):
        train(experiment(), dataset_dir, tmp_path / "output", scratch)
    for name, tensor in load_file(scratch / "checkpoint-5" / "model.safetensors").items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (
            2,
            r"is 8: out of memory on cpu; 2 fits: set it to 2, and .*accumulation_steps to 8 for the same",
        ),
        (0, r"is 8: out of memory on cpu; one window does not fit either: lower tokenizer.sequence_length"),
    ],
)
def test_out_of_memory_names_the_batch_that_would_have_fitted(dataset_dir, tmp_path, monkeypatch, room, says):
    whole = loss.linear_cross_entropy

    def in_little_memory(hidden_BTD, *args, **kwargs):
        if len(hidden_BTD) > room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes")
        return whole(hidden_BTD, *args, **kwargs)

    monkeypatch.setattr(loss, "linear_cross_entropy", in_little_memory)
    settings = experiment(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(PipelineError, match=says):
        train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch")


def test_out_of_memory_after_a_resume_on_fewer_processes_advises_for_those(dataset_dir, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step > 5:
            raise Killed

    settings = experiment(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    settings.model.attention_dropout = 0.0  # each process would draw its own
    scratch = tmp_path / "scratch"
    with pytest.raises(Killed):
        train(settings, dataset_dir, tmp_path / "output", scratch, on_metrics=kill)
    record = scratch / checkpoints.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"processes": 2}))
    whole = loss.linear_cross_entropy

    def in_little_memory(hidden_BTD, *args, **kwargs):
        if len(hidden_BTD) > 2:
            raise MemoryError
        return whole(hidden_BTD, *args, **kwargs)

    monkeypatch.setattr(loss, "linear_cross_entropy", in_little_memory)
    # 8 windows, 2 passes, 2 processes: 32 windows, which one process takes as 16 passes of 2.
    with pytest.raises(PipelineError, match=r"is 8: .*set it to 2, and .*accumulation_steps to 16 for the same batch"):
        train(settings, dataset_dir, tmp_path / "output", scratch)


def test_what_the_model_wrote_at_each_evaluation_is_kept(run):
    output, _, metrics, _ = run
    text = (output / "progress.md").read_text()
    evaluated = [step for step, values in metrics if "eval_loss" in values and step]
    assert [f"Step {step:,}," in text for step in evaluated] == [True] * len(evaluated)


def test_a_disk_that_takes_no_more_is_one_line_and_the_last_checkpoint_stays(dataset_dir, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(step, metrics):
        if step > 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    scratch = tmp_path / "scratch"
    try:
        with pytest.raises(PipelineError, match=rf"cannot write checkpoint-8 to {scratch}: .*{scratch}/checkpoint-5"):
            train(experiment(), dataset_dir, tmp_path / "output", scratch, on_metrics=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps_saved(scratch) == [4, 5]
    assert train(experiment(), dataset_dir, tmp_path / "output", scratch).resumed_from_step == 5


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"arguments": {"learning_rat": 1}},
            r"names 'learning_rat': expected a name of transformers.TrainingArguments",
        ),
        ({"arguments": {"learning_rate": 1}}, r"names 'learning_rate': set training.learning_rate itself"),
        ({"arguments": {"report_to": "all"}}, r"names 'report_to': the training loop fixes it"),
        ({"arguments": {"lr_scheduler_type": "steep"}}, r"refused by TrainingArguments: .*steep"),
        ({"device": "cuda"}, r"training.device is 'cuda': PyTorch .* sees no GPU; set it to 'cpu' or 'auto'"),
        ({"precision": "float16"}, r"training.precision is 'float16' on the CPU"),
        ({"per_device_train_batch_size": 9999}, r"expected at least one batch \(9999 windows\)"),
    ],
)
def test_settings_that_no_run_could_use_are_refused_in_one_line(dataset_dir, tmp_path, training, message):
    with pytest.raises(PipelineError, match=message) as caught:
        train(experiment(**training), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scratch").exists()


def test_arguments_pass_through_to_the_trainer(dataset_dir, tmp_path):
    rates = []
    train(
        experiment(max_steps=4, warmup_steps=0, logging_steps=1, arguments={"lr_scheduler_type": "constant"}),
        dataset_dir,
        tmp_path / "output",
        tmp_path / "scratch",
        on_metrics=lambda step, metrics: rates.append(metrics.get("learning_rate")),
    )
    assert {rate for rate in rates if rate} == {experiment().training.learning_rate}


def test_a_batch_holds_ids_and_labels_and_no_mask():
    window = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    batch = trainer.collate([window, window])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (2, 4)


def test_every_pass_takes_each_window_once_in_an_order_of_its_own():
    order = list(trainer.WindowSampler(windows=7, samples=17, seed=0))
    assert len(order) == 17
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    assert order == list(trainer.WindowSampler(windows=7, samples=17, seed=0))
    assert order != list(trainer.WindowSampler(windows=7, samples=17, seed=1))
