"""Quantizes a checkpoint's weights for serving, to int8 or int4, and measures the loss in quality.

`quantize_checkpoint` writes a directory that `model.weights.loading.load_model` reads, measures it on held-out text and
has a fresh process load it before it returns. The layers themselves are `model/weights/int8.py` and `int4.py`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.artifact import write_json
from model.errors import PipelineError, limits_as_error
from model.evaluation import Agreement, compare, evaluate
from model.generation.steps.choose import choose_step
from model.generation.steps.predictor import StepPredictor
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import QuantizationSettings
from model.system.commands import ending_with_parent
from model.system.cpu import limit_threads
from model.text.tokens import TokenDataset
from model.weights import int4, int8
from model.weights.loading import FORMAT_VERSION, QUANTIZATION, WEIGHTS, load_model, logits_digest, read_method

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")


@dataclass
class QuantizationSummary:
    """Results and costs of a quantization; `summary.json` of the directory."""

    method: str
    scheme: str
    parameters: int
    """Weights, tied ones once, scales not counted."""
    bytes_before: int
    """Size of model.safetensors in the checkpoint."""
    bytes_after: int
    ratio: float
    """bytes_before / bytes_after."""
    bits_per_byte_before: float
    """On `evaluated_tokens` of the validation split, the same for both."""
    bits_per_byte_after: float
    """Through `step`, as the service computes it; so are the next two."""
    top1_agreement: float
    """Share of positions, 0 to 1, at which both models find the same token most likely."""
    kl_divergence: float
    """Mean KL(full precision || quantized), nats per token."""
    evaluated_tokens: int
    step: str
    """Which implementation of a step computed the quantized model, see `model/generation/steps/choose.py`."""


def quantize_checkpoint(
    settings: QuantizationSettings,
    checkpoint_dir: Path,
    dataset_dir: Path,
    output_dir: Path,
    *,
    sequence_length: int,
    log: Log = silent,
) -> QuantizationSummary:
    """Write the checkpoint's weights by `settings.method` to `output_dir`, and the cost on held-out text.

    method "none" copies the weights unchanged, so that later stages need not know the difference.
    Raises PipelineError if the checkpoint cannot be read, is quantized already, or if a fresh process does not
    get the same logits, to the last bit, from the files written.
    """
    if read_method(checkpoint_dir) != "none":
        raise PipelineError(f"{checkpoint_dir} is quantized already: expected a full-precision checkpoint")
    limit_threads()
    reference = load_model(checkpoint_dir)
    log(f"quantization: {int8.count_parameters(reference):,} parameters, method {settings.method}")
    with limits_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        scheme = _write_model(settings.method, checkpoint_dir, output_dir)
        model = load_model(output_dir)
        dataset, windows = TokenDataset(dataset_dir, "validation", sequence_length), settings.evaluation_windows
        with _load_in_a_fresh_process(output_dir) as fresh:  # while this one evaluates
            before = evaluate(reference, dataset, max_windows=windows, log=log)
            after, agreement = before, Agreement(top1_agreement=1.0, kl_divergence=0.0)
            chosen = choose_step(model)
            if settings.method != "none":
                served = StepPredictor(chosen.create(model, 1))
                after = evaluate(served, dataset, max_windows=windows, log=log)
                agreement = compare(served, reference, dataset, max_windows=windows)
            _check_fresh(fresh, output_dir, logits_digest(model))
        log("quantization: a fresh process loads the files and gets the same logits")
        sizes = [(directory / WEIGHTS).stat().st_size for directory in (checkpoint_dir, output_dir)]
        summary = QuantizationSummary(
            method=settings.method,
            scheme=scheme,
            parameters=int8.count_parameters(model),
            bytes_before=sizes[0],
            bytes_after=sizes[1],
            ratio=sizes[0] / sizes[1],
            bits_per_byte_before=before.bits_per_byte,
            bits_per_byte_after=after.bits_per_byte,
            top1_agreement=agreement.top1_agreement,
            kl_divergence=agreement.kl_divergence,
            evaluated_tokens=after.tokens,
            step=chosen.name,
        )
        write_json(output_dir / "summary.json", asdict(summary))
        (output_dir / "README.md").write_text(_model_card(checkpoint_dir / "README.md", summary), encoding="utf-8")
    log(
        f"quantization: {summary.ratio:.2f} times smaller, {summary.bits_per_byte_before:.4f} to "
        f"{summary.bits_per_byte_after:.4f} bits per byte, {100 * summary.top1_agreement:.1f} % the same top token"
    )
    return summary


def _write_model(method: str, checkpoint_dir: Path, output_dir: Path) -> str:
    """Weights, configuration and tokenizer; returns the scheme in words."""
    kept = [*TOKENIZER_FILES, "generation_config.json", "loss.png"]
    config = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    if method == "none":
        scheme = "weights as trained"
        shutil.copyfile(checkpoint_dir / WEIGHTS, output_dir / WEIGHTS)
        kept.append("*_rex.py")
    else:
        kind = {"int8": int8, "int4": int4}[method]
        scheme = kind.SCHEME
        model = kind.quantize(load_model(checkpoint_dir))
        _save_weights(model, output_dir / WEIGHTS)
        # transformers would read integers without their scales as floats: an unknown method makes it say so.
        config.pop("auto_map", None)
        config["quantization_config"] = {"quant_method": f"rex_{method}", "loader": "model.weights.loading.load_model"}
    write_json(output_dir / "config.json", config)
    for pattern in kept:
        for path in sorted(checkpoint_dir.glob(pattern)):
            shutil.copyfile(path, output_dir / path.name)
    write_json(output_dir / QUANTIZATION, {"format_version": FORMAT_VERSION, "method": method, "scheme": scheme})
    return scheme


def _save_weights(model: RexForCausalLM, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private, and a service runs as another user


def _load_in_a_fresh_process(model_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "model.weights.loading", str(model_dir), "--threads", str(torch.get_num_threads())]
    # The child finds this package wherever the parent did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.Popen(
        ending_with_parent(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _check_fresh(process: subprocess.Popen[str], model_dir: Path, expected_digest: str) -> None:
    output, errors = process.communicate()
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise PipelineError(f"a fresh process cannot load {model_dir}: {reason}")
    found = json.loads(output.splitlines()[-1])["logits_sha256"]
    if found != expected_digest:
        raise PipelineError(
            f"a fresh process gets other logits from {model_dir} (sha256 {found[:12]}, expected "
            f"{expected_digest[:12]}): the files differ from the measured model; quantize again"
        )


def _model_card(checkpoint_card: Path, summary: QuantizationSummary) -> str:
    """The checkpoint's card with its Load section replaced and a Quantization section added."""
    card = checkpoint_card.read_text(encoding="utf-8") if checkpoint_card.is_file() else ""
    if summary.method == "none":
        return card.rstrip() + "\n\n## Quantization\n\nNone: the weights are those of the checkpoint.\n"
    card = re.sub(r"^## Load\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    return f"""{card.rstrip()}

## Load

```python
from pathlib import Path

from model.weights.loading import load_model

model = load_model(Path("."))  # this project's package; transformers alone does not know the format
```

## Quantization

{summary.scheme[0].upper()}{summary.scheme[1:]}.

| | full precision | {summary.method} |
|---|---|---|
| model.safetensors, bytes | {summary.bytes_before:,} | {summary.bytes_after:,} |
| bits per byte | {summary.bits_per_byte_before:.4f} | {summary.bits_per_byte_after:.4f} |

Measured through the {summary.step} step of the generation engine. The same top token at
{100 * summary.top1_agreement:.2f} % of positions, KL divergence {summary.kl_divergence:.6f} nats per token, over
{summary.evaluated_tokens:,} tokens of the validation split.
"""
