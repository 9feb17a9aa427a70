import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.artifact import MANIFEST, file_digests
from model.build import build_config, build_model
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings
from model.weights import int8
from model.weights.loading import load_model, logits_digest
from tests.support.tiny import save_tiny_model, tiny_model, tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def model_dir(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def logits(model: RexForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS_BT).logits


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(model_dir: Path, **kwargs) -> str:
    with pytest.raises(PipelineError) as caught:
        load_model(model_dir, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model_dir) in message
    return message


def test_a_checkpoint_loads_frozen_in_eval_mode_with_its_generation_config(original):
    model = load_model(original)
    assert torch.equal(logits(model), logits(tiny_model(tiny_tokenizer())))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.eos_token_id == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize("quantized", [None, False, True])
def test_tied_weights_load_tied(tmp_path, quantized):
    settings = ModelSettings(hidden_size=32, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True)
    saved = build_model(build_config(settings, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1), seed=0).eval()
    saved.save_pretrained(tmp_path)
    model = load_model(tmp_path, quantized=quantized)
    assert int8.count_parameters(model) == sum(parameter.numel() for parameter in saved.parameters())
    assert (logits(model) - logits(saved)).norm() / logits(saved).norm() < 0.05
    if not quantized:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_logits_equal_those_of_from_pretrained(original):
    assert torch.equal(logits(load_model(original)), logits(RexForCausalLM.from_pretrained(original).eval()))


def test_quantized_true_quantizes_on_load_and_false_undoes_it(original):
    quantized = load_model(original, quantized=True)
    assert int8.is_quantized(quantized)
    assert not int8.is_quantized(load_model(original, quantized=False))
    assert not int8.is_quantized(load_model(original))
    expected = logits(load_model(original))
    assert not torch.equal(logits(quantized), expected)
    assert (logits(quantized) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("quantized", [None, False])
def test_bfloat16_keeps_the_rotary_frequencies_exact(original, quantized):
    exact = load_model(original).model.rotary_emb.inv_freq
    model = load_model(original, dtype=torch.bfloat16, quantized=quantized)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert logits(model).dtype == torch.bfloat16


def test_a_checkpoint_stored_in_bfloat16_stays_so(model_dir):
    weights = {name: value.bfloat16() for name, value in load_file(model_dir / "model.safetensors").items()}
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    assert load_model(model_dir).dtype == torch.bfloat16
    assert load_model(model_dir, dtype=torch.float32).dtype == torch.float32


def test_the_files_may_be_deleted_while_the_model_runs(model_dir):
    model = load_model(model_dir)
    before = logits(model)
    shutil.rmtree(model_dir)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    assert f"{name} is missing" in refusal(model_dir)


def test_a_file_altered_after_publishing_is_refused(model_dir):
    (model_dir / MANIFEST).write_text(json.dumps({"files": file_digests(model_dir)}))
    load_model(model_dir)
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "model.safetensors was altered" in refusal(model_dir)


def test_a_truncated_weight_file_is_refused(model_dir):
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "not a readable safetensors file" in refusal(model_dir)


def test_a_pickle_in_place_of_the_weights_is_not_read(model_dir):
    torch.save({}, model_dir / "model.safetensors")
    assert "not a readable safetensors file" in refusal(model_dir)


def test_weights_of_another_shape_are_refused(model_dir):
    edit_json(model_dir / "config.json", intermediate_size=80)
    message = refusal(model_dir)
    assert "(64, 32): expected (80, 32)" in message or "(32, 64): expected (32, 80)" in message


def test_a_missing_and_a_surplus_tensor_are_named(model_dir):
    edit_json(model_dir / "config.json", num_hidden_layers=3)
    assert "no tensor model.layers.2" in refusal(model_dir)
    edit_json(model_dir / "config.json", num_hidden_layers=1)
    assert "model.layers.1" in refusal(model_dir)


def test_another_architecture_is_refused(model_dir):
    edit_json(model_dir / "config.json", model_type="llama")
    assert "model_type 'llama': expected 'rex'" in refusal(model_dir)


def test_an_impossible_configuration_is_refused(model_dir):
    edit_json(model_dir / "config.json", num_key_value_heads=3)
    assert "num_attention_heads is 4" in refusal(model_dir)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(model_dir, text):
    (model_dir / "config.json").write_text(text)
    assert "JSON" in refusal(model_dir)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"format_version": 99, "method": "int8"}, "format_version 99: expected 1"),
        ({"format_version": 1, "method": "int3"}, "method 'int3': expected one of int8, int4, none"),
    ],
)
def test_an_unknown_quantization_is_refused(model_dir, stored, expected):
    (model_dir / "quantization.json").write_text(json.dumps(stored))
    assert expected in refusal(model_dir)


def test_float_weights_that_claim_to_be_int8_are_refused(model_dir):
    (model_dir / "quantization.json").write_text(json.dumps({"format_version": 1, "method": "int8"}))
    assert "weight_scale" in refusal(model_dir)


def test_code_in_the_directory_is_never_run(model_dir):
    witness = model_dir / "witness"
    for name in ("configuration_rex.py", "modeling_rex.py"):
        (model_dir / name).write_text(f"open({str(witness)!r}, 'w')")
    load_model(model_dir)
    assert not witness.exists()


@pytest.mark.processes
def test_the_command_prints_the_digest_of_the_logits(original):
    done = subprocess.run(
        [sys.executable, "-m", "model.weights.loading", str(original), "--threads", str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["logits_sha256"] == logits_digest(load_model(original))
