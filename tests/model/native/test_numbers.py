"""What the native step computes is what the model is: against float64, against the int8 layers, against generate()."""

import numpy as np
import pytest
import torch

from model.native.library import ACTIVATION_LEVELS, NativeModel, NativeSession, Segment, unsupported
from model.weights import int4, int8
from tests.support.tiny import ROTATIONS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.medium

IDS = np.arange(60) * 7 % 270 + 2
SHAPES = [
    {},
    {"post_norm": False},
    {"post_norm": False, "qk_norm": True},
    {"post_norm": False, "qk_norm": True, "head_dim": 10, "num_key_value_heads": 1},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16},
    {"tie_word_embeddings": True},
    {"head_dim": 10},
    {"hidden_size": 160, "intermediate_size": 200, "head_dim": 64, "num_hidden_layers": 3, "initializer_range": 0.1},
    *ROTATIONS,
]

QUANTIZED = [
    *((int8, shape) for shape in SHAPES),
    *((int4, {"head_dim": 16, **shape}) for shape in SHAPES if shape.get("head_dim", 16) % 16 == 0),
]


def exact(model, ids: np.ndarray) -> np.ndarray:
    """Logits in float64."""
    with torch.inference_mode():
        return model.double()(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def computed(model, ids: np.ndarray, **options) -> np.ndarray:
    """Logits of every token, first half as one segment, then one by one."""
    session = NativeSession(NativeModel(model, **options), 2)
    half = len(ids) // 2
    parts = [session.step([Segment(1, 0, ids[:half], half)])[0]]
    parts += [session.step([Segment(1, at, ids[at : at + 1], 1)])[0] for at in range(half, len(ids))]
    return np.concatenate(parts)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the expected logits."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_logits_are_those_of_float64_to_five_digits(instructions, shape):
    model = tiny_model(tiny_tokenizer(), **shape)
    found = computed(model, IDS, instructions=instructions)
    assert relative_error(found, exact(model, IDS)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_logits_are_nearer_to_float64_than_those_of_torch(instructions, shape):
    model = tiny_model(tiny_tokenizer(), **shape).to(torch.bfloat16)
    found = computed(model, IDS, instructions=instructions)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].float().numpy()
    expected = exact(model, IDS)
    # Keys and values are rounded to 8 bits; all else is float32.
    assert relative_error(found, expected) < 0.02
    assert relative_error(found, expected) < 0.5 * relative_error(theirs, expected)


def by_whole_numbers(model) -> None:
    """Let the quantized layers of a model multiply as the native step does, in float64: 127 levels per token."""

    def project(self, x_MK):
        scale = x_MK.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / ACTIVATION_LEVELS
        whole_MK = (x_MK / scale).round()
        return whole_MK @ self._float(torch.float64).T * scale

    for module in model.modules():
        if isinstance(module, int8.QuantizedMatrix):
            module.project = project.__get__(module)
            module.like = module.like.double()


@pytest.mark.parametrize(("kind", "shape"), QUANTIZED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_quantized_logits_are_those_of_whole_numbers(instructions, shape, kind):
    model = kind.quantize(tiny_model(tiny_tokenizer(), **shape))
    session = NativeSession(NativeModel(model, instructions=instructions), 1, cache_dtype=torch.float32)
    found, _, _ = session.step([Segment(0, 0, IDS, len(IDS))])
    by_whole_numbers(model)
    # Where an activation lies between two whole numbers, rounding errors decide: then one of them is off by one.
    assert relative_error(found, exact(model, IDS)) < (0.015 if kind is int8 else 0.02)


@pytest.mark.parametrize(("kind", "shape"), QUANTIZED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_quantized_logits_are_near_those_of_the_reference(instructions, shape, kind):
    model = kind.quantize(tiny_model(tiny_tokenizer(), **shape))
    found = computed(model, IDS, instructions=instructions)
    with torch.inference_mode():
        expected = model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    # The reference computes layers this small in float32: what is left is the rounding of activations and of the cache.
    assert relative_error(found, expected) < 0.06


def test_int4_layers_of_many_groups_use_every_value_and_multiply_as_whole_numbers(instructions):
    model = tiny_model(tiny_tokenizer(), hidden_size=192, intermediate_size=320, num_attention_heads=6, head_dim=32)
    int4.quantize(model)
    kinds = {type(module).__name__ for module in model.modules()} & {"Int4Linear", "Int8Linear", "Int8Embedding"}
    assert kinds == {"Int4Linear", "Int8Linear", "Int8Embedding"}  # the head is int8
    layers = [layer for layer in model.modules() if isinstance(layer, int4.Int4Linear)]
    assert torch.cat([(layer.weight & 15).flatten() for layer in layers]).unique().tolist() == list(range(16))
    session = NativeSession(NativeModel(model, instructions=instructions), 1, cache_dtype=torch.float32)
    found, _, _ = session.step([Segment(0, 0, IDS, len(IDS))])
    by_whole_numbers(model)
    assert relative_error(found, exact(model, IDS)) < 0.02


def test_int4_heads_that_are_no_whole_blocks_take_the_reference_step():
    model = int4.quantize(tiny_model(tiny_tokenizer(), head_dim=10))
    assert unsupported(model) == "int4 heads of 10: expected a multiple of 16"
    assert unsupported(int8.quantize(tiny_model(tiny_tokenizer(), head_dim=10))) is None


def test_int8_of_large_layers_is_as_near_to_full_activations_as_the_reference(instructions):
    # Large enough for the reference to multiply in int8 too, with activations in 63 levels.
    model = tiny_model(tiny_tokenizer(), hidden_size=512, intermediate_size=1024, initializer_range=0.05)
    int8.quantize(model)
    found = computed(model, IDS, instructions=instructions)
    with torch.inference_mode():
        reference = model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    full = exact(int8.dequantize(model), IDS)
    assert relative_error(found, reference) < 0.06
    assert relative_error(found, full) < max(1.2 * relative_error(reference, full), 0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_tokens_of_float32_are_those_of_generate(instructions, shape):
    model = tiny_model(tiny_tokenizer(), **shape)
    session = NativeSession(NativeModel(model, instructions=instructions), 1)
    prompt, made = IDS[:20], []
    while len(made) < 40:
        ids = np.concatenate([prompt, made]) if not made else np.array(made[-1:])
        start = 0 if not made else len(prompt) + len(made) - 1
        _, best, _ = session.step([Segment(0, start, ids.astype(np.int64), 1)], logits=False)
        made.append(int(best[0]))
    expected = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    assert made == expected


def test_the_highest_logit_is_the_first_of_the_highest_and_broken_weights_show(instructions):
    model = tiny_model(tiny_tokenizer())
    session = NativeSession(NativeModel(model, instructions=instructions), 1)
    logits, best, highest = session.step([Segment(0, 0, IDS, len(IDS))])
    assert best.tolist() == logits.argmax(axis=1).tolist()
    assert highest.tolist() == logits.max(axis=1).tolist()
    with torch.no_grad():
        model.lm_head.weight[100] = torch.nan
    _, _, highest = NativeSession(NativeModel(model, instructions=instructions), 1).step([Segment(0, 0, IDS, 1)])
    assert np.isnan(highest).all()


def test_an_activation_that_is_no_number_is_not_hidden_by_whole_numbers(instructions):
    model = int8.quantize(tiny_model(tiny_tokenizer()))
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = torch.nan
    logits, _, highest = NativeSession(NativeModel(model, instructions=instructions), 1).step([Segment(0, 0, IDS, 1)])
    assert np.isnan(logits).all() and np.isnan(highest).all()
