import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import DynamicCache

from model.build import build_config, build_model
from model.errors import PipelineError
from model.evaluation import compare, evaluate
from model.generation.steps.choose import choose_step
from model.generation.steps.predictor import StepPredictor
from model.modeling_rex import RexForCausalLM
from model.quantization import QuantizationSummary, quantize_checkpoint
from model.settings import ModelSettings, QuantizationSettings
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.weights import int4, int8
from model.weights.int8 import Int8Embedding, Int8Linear, count_parameters, dequantize, quantize, quantize_weight
from model.weights.loading import load_model
from tests.model.training.tiny import TOKENIZER, make_dataset

SHAPE = ModelSettings(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def tiny_model(tie_word_embeddings: bool = True) -> RexForCausalLM:
    config = build_config(SHAPE, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config.tie_word_embeddings = tie_word_embeddings
    return build_model(config, seed=0).eval().requires_grad_(False)


@pytest.fixture(params=["packed", "dequantized"])
def kernel(request, monkeypatch):
    """Both ways to multiply; tiny layers would all take the second."""
    monkeypatch.setattr(int8, "INT8_MIN_WEIGHTS", 0 if request.param == "packed" else 1 << 40)
    return request.param


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory, dataset_dir) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(directory)
    load_tokenizer(dataset_dir / "tokenizer").save_pretrained(directory)
    card = "# tiny\n\n## Load\n\nAutoModelForCausalLM\n\n## Samples\n\nthe cat\n"
    (directory / "README.md").write_text(card)
    (directory / "curves.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def int8_dir(tmp_path_factory, checkpoint_dir, dataset_dir) -> tuple[Path, QuantizationSummary]:
    directory = tmp_path_factory.mktemp("int8")
    summary = quantize_checkpoint(
        QuantizationSettings("int8", evaluation_windows=3),
        checkpoint_dir,
        dataset_dir,
        directory,
        sequence_length=TOKENIZER.sequence_length,
    )
    return directory, summary


def logits(model: nn.Module, ids_BT: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids_BT, **kwargs).logits


def test_every_weight_is_within_half_a_step_of_its_int8_value():
    weight_NK = torch.randn(20, 30) * torch.logspace(-6, 3, 20)[:, None]
    quantized_NK, scale_N = quantize_weight(weight_NK)
    error_NK = (quantized_NK.float() * scale_N[:, None] - weight_NK).abs()
    assert (error_NK <= scale_N[:, None] * 0.5001).all()
    assert (quantized_NK.abs().amax(dim=1) == 127).all()


def test_a_row_of_zeros_stays_zero():
    quantized_NK, scale_N = quantize_weight(torch.zeros(2, 8))
    assert not quantized_NK.any()
    assert scale_N.isfinite().all()


def test_the_int8_product_is_exact_where_sums_of_products_are_largest(kernel):
    layer = Int8Linear(16, 256, torch.float32, torch.device("cpu"))
    layer.set_weight(torch.full((16, 256), 127.0))
    torch.testing.assert_close(layer(torch.ones(2, 256)), torch.full((2, 16), 127.0 * 256), rtol=1e-6, atol=0)


def test_an_int8_layer_follows_the_float_layer(kernel):
    torch.manual_seed(0)
    weight_NK, x_MK = torch.randn(64, 128), torch.randn(5, 128)
    layer = Int8Linear(64, 128, torch.float32, torch.device("cpu"))
    layer.set_weight(weight_NK)
    expected_MN = x_MK @ weight_NK.T
    assert (layer(x_MK) - expected_MN).norm() / expected_MN.norm() < (0.03 if kernel == "packed" else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(kernel, dtype):
    layer = Int8Linear(8, 16, torch.float32, torch.device("cpu"))
    layer.set_weight(
        torch.full((8, 16), 500.0)
    )  # sums of 16 int8 products times 500 fit float16 only when scaled first
    result = layer(torch.ones(3, 16, dtype=dtype))
    assert result.dtype == dtype
    assert torch.allclose(result.float(), torch.full((3, 8), 8000.0), rtol=0.01)


def test_a_row_of_zeros_in_the_activations_gives_zeros(kernel):
    layer = Int8Linear(8, 16, torch.float32, torch.device("cpu"))
    layer.set_weight(torch.randn(8, 16))
    x_MK = torch.stack([torch.zeros(16), torch.ones(16)])
    assert not layer(x_MK)[0].any()


def test_other_sequences_in_a_batch_change_nothing(kernel):
    model = quantize(tiny_model())
    ids_BT = torch.randint(0, 300, (4, 20))
    together = logits(model, ids_BT)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], logits(model, ids_BT[row : row + 1]), rtol=1e-4, atol=1e-4)


def test_later_tokens_change_nothing_before_them(kernel):
    model = quantize(tiny_model())
    ids_BT = torch.randint(0, 300, (1, 20))
    other_BT = torch.cat([ids_BT[:, :10], torch.randint(0, 300, (1, 10))], dim=1)
    torch.testing.assert_close(logits(model, ids_BT)[:, :10], logits(model, other_BT)[:, :10], rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_gives_the_logits_without():
    model = quantize(tiny_model())
    ids_BT, cache = torch.randint(0, 300, (2, 12)), DynamicCache(config=model.config)
    steps = [logits(model, ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids_BT, use_cache=False), rtol=1e-4, atol=1e-4)


def test_tied_weights_are_one_table_and_untied_ones_two():
    tied, untied = quantize(tiny_model()), quantize(tiny_model(tie_word_embeddings=False))
    assert "lm_head.weight" not in tied.state_dict()
    assert isinstance(untied.lm_head, Int8Linear)
    assert count_parameters(untied) - count_parameters(tied) == 300 * 32
    assert count_parameters(tied) == sum(p.numel() for p in tiny_model().parameters())


def test_dequantizing_gives_a_float_model_with_the_rounded_weights():
    original, quantized = tiny_model(), quantize(tiny_model())
    restored = dequantize(copy.deepcopy(quantized))
    assert not int8.is_quantized(restored)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    assert restored.state_dict().keys() == original.state_dict().keys()
    ids_BT = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(logits(restored, ids_BT), logits(quantized, ids_BT), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(restored, ids_BT), logits(original, ids_BT))


def test_moving_a_model_to_bfloat16_keeps_the_scales_exact():
    model = quantize(tiny_model())
    before = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    nn.Module.to(model, torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_scale, before)
    assert model.model.embed_tokens(torch.tensor([[5]])).dtype == torch.bfloat16
    assert logits(model, torch.tensor([[5, 6]])).dtype == torch.bfloat16


def test_new_weights_replace_what_a_layer_has_packed(kernel):
    layer = Int8Linear(4, 8, torch.float32, torch.device("cpu"))
    layer.set_weight(torch.ones(4, 8))
    x_MK = torch.ones(1, 8)
    assert layer(x_MK)[0, 0] == pytest.approx(8)
    other = Int8Linear(4, 8, torch.float32, torch.device("cpu"))
    other.set_weight(torch.full((4, 8), 2.0))
    layer.load_state_dict(other.state_dict())
    assert layer(x_MK)[0, 0] == pytest.approx(16)


def test_a_compiled_graph_needs_no_int8_kernel():
    layer = Int8Linear(16, 8, torch.float32, torch.device("cpu"))
    layer.set_weight(torch.randn(16, 8))
    x_MK = torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_MK), layer(x_MK), rtol=1e-5, atol=1e-5)


def test_generate_works_on_a_quantized_model():
    model = quantize(tiny_model())
    output_BT = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert output_BT.shape == (1, 8)


def test_a_layer_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="0 has a bias"):
        quantize(nn.Sequential(nn.Linear(4, 4)))


def test_the_directory_holds_int8_and_what_a_model_needs(int8_dir):
    directory, _ = int8_dir
    with safe_open(directory / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes["model.embed_tokens.weight"] == torch.int8
    assert dtypes["model.embed_tokens.weight_scale"] == torch.float32
    assert dtypes["model.layers.1.mlp.down_proj.weight"] == torch.int8
    assert dtypes["model.norm.weight"] == torch.float32
    assert not any("lm_head" in name for name in dtypes)
    assert {path.name for path in directory.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization.json",
        "summary.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (directory / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_summary_tells_size_and_quality(int8_dir, checkpoint_dir, dataset_dir):
    directory, summary = int8_dir
    assert QuantizationSummary(**json.loads((directory / "summary.json").read_text())) == summary
    assert summary.bytes_before == (checkpoint_dir / "model.safetensors").stat().st_size
    assert summary.bytes_after == (directory / "model.safetensors").stat().st_size < summary.bytes_before / 2
    assert summary.parameters == sum(p.numel() for p in tiny_model().parameters())
    dataset = TokenDataset(dataset_dir, "validation", TOKENIZER.sequence_length)
    step = choose_step(load_model(directory))
    served = StepPredictor(step.create(load_model(directory), 1))
    agreement = compare(served, load_model(checkpoint_dir), dataset, max_windows=3)
    assert summary.step == step.name
    assert summary.bits_per_byte_after == pytest.approx(evaluate(served, dataset, max_windows=3).bits_per_byte)
    assert summary.top1_agreement == pytest.approx(agreement.top1_agreement)
    assert summary.kl_divergence == pytest.approx(agreement.kl_divergence, rel=1e-4)
    assert 0 < summary.kl_divergence < 0.01
    assert summary.bits_per_byte_after == pytest.approx(summary.bits_per_byte_before, rel=0.01)


def test_the_model_card_tells_what_quantization_costs_and_how_to_load(int8_dir):
    directory, summary = int8_dir
    card = (directory / "README.md").read_text()
    assert f"{summary.bits_per_byte_after:.4f}" in card
    assert "model.weights.loading" in card
    assert "AutoModelForCausalLM" not in card
    assert "the cat" in card


def test_transformers_says_that_it_does_not_know_the_format(int8_dir, caplog):
    RexForCausalLM.from_pretrained(int8_dir[0])
    assert "Unknown quantization type, got rex_int8" in caplog.text


@pytest.mark.processes
def test_method_none_copies_the_weights_as_they_are(tmp_path, checkpoint_dir, dataset_dir):
    summary = quantize_checkpoint(
        QuantizationSettings("none", evaluation_windows=2),
        checkpoint_dir,
        dataset_dir,
        tmp_path,
        sequence_length=TOKENIZER.sequence_length,
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint_dir / "model.safetensors").read_bytes()
    assert (summary.ratio, summary.top1_agreement, summary.kl_divergence) == (1.0, 1.0, 0.0)
    assert summary.bits_per_byte_after == summary.bits_per_byte_before
    assert RexForCausalLM.from_pretrained(tmp_path).config.vocab_size == 300


def test_a_quantized_directory_is_not_quantized_again(tmp_path, int8_dir, dataset_dir):
    with pytest.raises(PipelineError, match="is quantized already"):
        quantize_checkpoint(QuantizationSettings(), int8_dir[0], dataset_dir, tmp_path, sequence_length=64)


@pytest.mark.processes
def test_files_that_load_as_another_model_elsewhere_are_not_published(
    tmp_path, checkpoint_dir, dataset_dir, monkeypatch
):
    monkeypatch.setattr("model.quantization.logits_digest", lambda model: "0" * 64)
    with pytest.raises(PipelineError, match="a fresh process gets other logits"):
        quantize_checkpoint(
            QuantizationSettings("none", evaluation_windows=1),
            checkpoint_dir,
            dataset_dir,
            tmp_path,
            sequence_length=TOKENIZER.sequence_length,
        )
    assert not (tmp_path / "summary.json").exists()


def test_the_embedding_gives_dequantized_rows():
    table = Int8Embedding(10, 6, torch.float32, torch.device("cpu"))
    table.set_weight(torch.randn(10, 6))
    ids = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(table(ids), table.dequantized()[ids])


def test_a_checkpoint_in_int4_is_smaller_measured_and_loads_as_it_was(tmp_path, checkpoint_dir, int8_dir, dataset_dir):
    settings = QuantizationSettings("int4", evaluation_windows=3)
    summary = quantize_checkpoint(
        settings, checkpoint_dir, dataset_dir, tmp_path, sequence_length=TOKENIZER.sequence_length
    )
    assert summary.method == "int4" and summary.scheme == int4.SCHEME
    assert summary.bytes_after < int8_dir[1].bytes_after and summary.parameters == int8_dir[1].parameters
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weight, scale = (stored[f"model.layers.1.mlp.up_proj.{name}"] for name in ("weight", "weight_scale"))
    n, k = tiny_model().model.layers[1].mlp.up_proj.weight.shape
    assert weight.shape == (n, k // 2) and weight.dtype == torch.uint8
    assert scale.shape == (n, k // int4.GROUP) and scale.dtype == torch.bfloat16
    assert stored["model.embed_tokens.weight"].dtype == torch.int8
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype == torch.int8  # 48 inputs are not a multiple of a group
    assert torch.equal(load_model(tmp_path).model.layers[1].mlp.up_proj.weight, weight)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "rex_int4"
    plain = load_model(tmp_path, quantized=False)
    dataset = TokenDataset(dataset_dir, "validation", TOKENIZER.sequence_length)
    assert not int8.is_quantized(plain)
    # What the service computes differs from the plain weights by the rounding of activations alone.
    assert evaluate(plain, dataset, max_windows=3).bits_per_byte == pytest.approx(summary.bits_per_byte_after, rel=0.01)
