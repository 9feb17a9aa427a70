"""Loads a model directory, in full precision or quantized, and checks it before anything in it is trusted.

Reads config.json, model.safetensors and, if present, generation_config.json, quantization.json and manifest.json;
never a pickle and never code from the directory. `python -m model.weights.loading DIR` checks one and prints a digest
of its logits, which is how a quantized model proves that a fresh process loads it.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from model.artifact import MANIFEST, read_json, verify
from model.configuration_rex import RexConfig
from model.errors import PipelineError, one_line
from model.modeling_rex import RexForCausalLM
from model.system.cpu import limit_threads
from model.system.devices import resolve_device
from model.weights import int4, int8

WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization.json"
FORMAT_VERSION = 1
METHODS = ("int8", "int4", "none")
GENERATION = "generation_config.json"
_AGAIN = "make the model again"


def load_model(
    model_dir: Path, *, device: str = "cpu", quantized: bool | None = None, dtype: torch.dtype | None = None
) -> RexForCausalLM:
    """The model of a checkpoint or of a quantized directory, in eval mode, without gradients.

    quantized: True quantizes a full-precision model to int8, False dequantizes, None takes it as it is stored.
    dtype: of activations and unquantized weights; None keeps the stored one.
    Raises PipelineError, one line that names the path, for a directory that is incomplete, altered or not a REX model.
    """
    model_dir = Path(model_dir)
    if (model_dir / MANIFEST).is_file():
        verify(model_dir)
    config = read_config(model_dir)
    method = read_method(model_dir)
    target = resolve_device(device, setting="device")
    # Sizes that a damaged configuration names are compared with the file before memory is allocated for them.
    stored = stored_shapes(model_dir / WEIGHTS)
    _check_depth(stored, config, model_dir / WEIGHTS)
    with torch.device("meta"):
        _check_shapes(stored, _expected_shapes(_empty_model(config, method)), model_dir / WEIGHTS)
    model = _empty_model(config, method)
    load_weights(model, model_dir / WEIGHTS)
    if (model_dir / GENERATION).exists():
        model.generation_config = read_generation_config(model_dir)
    model.eval().requires_grad_(False)
    if quantized is True and method == "none":
        int8.quantize(model)
    elif quantized is False:
        int8.dequantize(model)
    _move(model, target, dtype or model.dtype)
    return model


def _empty_model(config: RexConfig, method: str) -> RexForCausalLM:
    with no_init_weights():
        model = RexForCausalLM(config)
    model.tie_weights()  # skipped with the initialization
    if method != "none":
        (int4 if method == "int4" else int8).quantize(model, values=False)
    return model


def read_generation_config(model_dir: Path) -> GenerationConfig:
    """The settings of generation of a model directory. Raises PipelineError if they are none."""
    path = model_dir / GENERATION
    raw = read_json(path, _AGAIN)
    try:
        found = GenerationConfig.from_dict(raw)
    except Exception as error:  # noqa: BLE001  transformers checks few types: the rest fails in several ways
        raise PipelineError(f"{path} is not valid: {one_line(error)}; {_AGAIN}") from None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(found, name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(number) is int and 0 <= number < 2**31 for number in ids):
            raise PipelineError(f"{path} has {name} {value!r}: expected the number of a token; {_AGAIN}")
    return found


def read_config(model_dir: Path) -> RexConfig:
    """The configuration of a model directory. Raises PipelineError if it is missing or not that of a REX model."""
    path = model_dir / "config.json"
    raw = read_json(path, _AGAIN)
    if raw.get("model_type") != "rex":
        raise PipelineError(
            f"{path} has model_type {raw.get('model_type')!r}: expected 'rex'; give the directory of a REX model"
        )
    try:
        config: RexConfig = RexConfig.from_dict(raw)
    except Exception as error:  # noqa: BLE001  the strict dataclass wraps its reasons in several types of its own
        reason = one_line(error.__cause__ or error)
        raise PipelineError(f"{path} is not a valid REX configuration: {reason}; {_AGAIN}") from None
    return config


def read_method(model_dir: Path) -> str:
    """How the weights are stored, one of METHODS. Raises PipelineError for formats that this version cannot read."""
    path = model_dir / QUANTIZATION
    if not path.is_file():
        return "none"
    raw = read_json(path, _AGAIN)
    if raw.get("format_version") != FORMAT_VERSION:
        raise PipelineError(
            f"{path} has format_version {raw.get('format_version')!r}: expected {FORMAT_VERSION}; quantize the "
            "checkpoint again with this version"
        )
    if raw.get("method") not in METHODS:
        raise PipelineError(
            f"{path} has method {raw.get('method')!r}: expected one of {', '.join(METHODS)}; quantize the checkpoint "
            "again"
        )
    return str(raw["method"])


def logits_digest(model: RexForCausalLM) -> str:
    """sha256 over the exact bits of the logits of one fixed input: equal if two processes loaded the same model."""
    ids = (torch.arange(min(32, model.config.max_position_embeddings)) * 7919 + 1) % model.config.vocab_size
    with torch.inference_mode():
        logits: Tensor = model(ids[None].to(model.device)).logits
    return hashlib.sha256(logits.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _move(model: RexForCausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Like `model.to`, but the rotary frequencies stay float32: rounded to bfloat16, far positions would blur."""
    rotary = model.model.rotary_emb
    exact = dict(rotary.named_buffers())
    torch.nn.Module.to(model, device=device, dtype=dtype)
    for name, buffer in exact.items():
        setattr(rotary, name, buffer.to(device))


def load_weights(model: RexForCausalLM, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Copy every tensor of `path` into `model`. dtype: of the weights then; None keeps the stored one.

    Copied, not mapped: torch aligns its own memory, so the same file gives the same bits in every process, and the file
    may be deleted while the model runs. Raises PipelineError for a file that is missing, unreadable or of other shapes.
    """
    expected = _expected_shapes(model)
    _check_shapes(stored_shapes(path), expected, path)
    with safe_open(path, framework="pt") as file:
        norm = file.get_tensor("model.norm.weight")
        _check_type("model.norm.weight", norm, model.model.norm.weight, path)
        _move(model, torch.device("cpu"), dtype or norm.dtype)
        targets = model.state_dict()
        with torch.no_grad():
            for name in expected:
                weight = file.get_tensor(name)
                _check_type(name, weight, targets[name], path)
                targets[name].copy_(weight)


def _expected_shapes(model: RexForCausalLM) -> dict[str, tuple[int, ...]]:
    # state_dict lists tied weights twice, the file once, under the embedding's name.
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file. Raises PipelineError if it is missing or unreadable."""
    if not path.is_file():
        raise PipelineError(f"{path} is missing: expected the weights of a model; make the model again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, IsADirectoryError) as error:
        raise PipelineError(f"{path} is not a readable safetensors file ({error}): make it again") from None


def _check_depth(found: Iterable[str], config: RexConfig, path: Path) -> None:
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    if config.num_hidden_layers > len(layers):
        raise PipelineError(
            f"{path} has no tensor model.layers.{len(layers)}, but config.json has num_hidden_layers "
            f"{config.num_hidden_layers}: make the model again"
        )


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise PipelineError(
                f"{path} has no tensor {name}, which config.json and {QUANTIZATION} call for: make the model again"
            )
        if found[name] != shape:
            raise PipelineError(
                f"{path} holds {name} with shape {found[name]}: expected {shape} from config.json; make the model again"
            )
    surplus = sorted(set(found) - set(expected))
    if surplus:
        raise PipelineError(f"{path} holds {surplus[0]}, which config.json has no place for: make the model again")


def _check_type(name: str, found: Tensor, target: Tensor, path: Path) -> None:
    if found.is_floating_point() != target.is_floating_point():
        kind = "floating-point numbers" if target.is_floating_point() else "integers"
        raise PipelineError(f"{path} holds {name} as {found.dtype}: expected {kind}; {_AGAIN}")


def main() -> int:
    """Check a model directory: `python -m model.weights.loading DIR`; one JSON line, or one line of error and exit
    status 1.
    """
    parser = argparse.ArgumentParser(prog="python -m model.weights.loading", description=main.__doc__)
    parser.add_argument("model_dir", type=Path, help="a checkpoint or a quantized model")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; default: usable cores")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    else:
        limit_threads()
    try:
        model = load_model(arguments.model_dir)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        json.dumps(
            {
                "parameters": int8.count_parameters(model),
                "quantized": int8.is_quantized(model),
                "dtype": str(model.dtype),
                "logits_sha256": logits_digest(model),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
