"""Writes the outputs of a training: weights, tokenizer, custom code, model card, curves, samples and summary."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from model.artifact import write_json
from model.errors import limits_as_error
from model.modeling_rex import RexForCausalLM
from model.settings import ExperimentSettings
from model.text.chat.template import end_ids
from model.training.outputs.curves import plot_loss
from model.training.outputs.summary import TrainingSummary

TIMING_FIELDS = frozenset(
    {
        "seconds",
        "tokens_per_second",
        "model_flops_per_second",
        "model_flops_utilization",
        "matmul_peak_flops",
        "peak_memory_bytes",
        "resumed_from_step",
    }
)
"""Reported, but kept out of the artifact so that identical trainings hash alike."""


def sample_texts(
    model: RexForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int, *, seed: int = 0
) -> dict[str, str]:
    """Continuation of each prompt: at most `tokens` tokens, sampled at temperature 0.8 from the 40 most likely.

    Preserves the state of the global generator, so that sampling during a training does not change it.
    """
    texts: dict[str, str] = {}
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for prompt in prompts if tokens else []:
            ids_1T = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            room = model.config.max_position_embeddings - ids_1T.shape[1]
            if ids_1T.shape[1] == 0 or room < 1:
                continue
            output_1T = model.generate(  # type: ignore[misc]  # a mixin that transformers leaves untyped
                input_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=min(tokens, room),
                do_sample=True,
                temperature=0.8,
                top_k=40,
                use_cache=True,
                eos_token_id=end_ids(tokenizer) or None,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts[prompt] = str(tokenizer.decode(output_1T[0, ids_1T.shape[1] :], skip_special_tokens=True))
    model.train(was_training)
    return texts


def write_outputs(
    settings: ExperimentSettings,
    model: RexForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    history: list[dict[str, Any]],
    summary: TrainingSummary,
    dataset_dir: Path,
    output_dir: Path,
) -> None:
    """Write the checkpoint directory. Raises PipelineError for limits of the system (`limits_as_error`)."""
    with limits_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        ends = end_ids(tokenizer)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(output_dir)
        (output_dir / "model.safetensors").chmod(0o644)  # safetensors makes it readable only to its owner
        tokenizer.save_pretrained(output_dir)
        write_json(output_dir / "curves.json", [_without_timing(entry) for entry in history], sort_keys=True)
        (output_dir / "progress.md").write_text(progress(history), encoding="utf-8")
        write_json(output_dir / "samples.json", summary.samples, sort_keys=True)
        write_json(output_dir / "summary.json", _without_timing(dataclasses.asdict(summary)), sort_keys=True)
        (output_dir / "README.md").write_text(model_card(settings, model, summary, dataset_dir), encoding="utf-8")
        plot_loss(history, output_dir / "loss.png", title=f"{settings.name}: loss")


def progress(history: list[dict[str, Any]]) -> str:
    """The sample text of each evaluation, as Markdown."""
    fence = "`" * 4
    parts = [
        f"Step {entry['step']:,}, {entry['bits_per_byte']:.4f} bits per byte:\n\n{fence}\n{entry['sample']}\n{fence}\n"
        for entry in history
        if "sample" in entry
    ]
    return "\n".join(parts)


def _without_timing(record: dict[str, Any]) -> dict[str, Any]:
    """The entry without the fields that differ between identical trainings."""
    return {key: value for key, value in record.items() if key not in TIMING_FIELDS and key != "sample"}


def model_card(settings: ExperimentSettings, model: RexForCausalLM, summary: TrainingSummary, dataset_dir: Path) -> str:
    """The model's README: architecture, training data, scores, and how to load it."""
    config = model.config
    dataset_file = dataset_dir / "summary.json"
    dataset = json.loads(dataset_file.read_text(encoding="utf-8")) if dataset_file.is_file() else {}
    numbers = {k: v for k, v in dataset.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    data_rows = "\n".join(f"| {key} | {_number(value)} |" for key, value in numbers.items())
    fence = "`" * 4
    samples = "\n\n".join(f"{fence}\n{prompt}{text}\n{fence}" for prompt, text in summary.samples.items())
    norms = f"{'before and after' if config.post_norm else 'before'} each branch"
    norms += ", and of queries and keys" if config.qk_norm else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rex]
---

# {settings.name}

{settings.description or "A REX language model."}

| | |
|---|---|
| parameters | {summary.parameters:,} |
| layers, hidden size, intermediate size | {config.num_hidden_layers}, {config.hidden_size}, \
{config.intermediate_size} |
| query heads, key/value heads, head size | {config.num_attention_heads}, \
{config.num_key_value_heads}, {config.head_dim} |
| vocabulary, context | {config.vocab_size:,} tokens, {config.max_position_embeddings:,} tokens |
| architecture | decoder, grouped-query attention, rotary embeddings, SwiGLU, RMSNorm {norms} |

## Data

Source: {settings.corpus.source}; license: {settings.corpus.license}.

| | |
|---|---|
{data_rows}

## Training

| | |
|---|---|
| steps | {summary.steps:,} (best: {summary.best_step:,}) |
| tokens | {summary.tokens:,} |
| hardware, precision | {summary.device}, {summary.precision} |
| optimizer | {settings.training.optim} |
| seed | {settings.training.seed} |

![loss](loss.png)

## Score on the held-out validation split

| | |
|---|---|
| bits per byte | {summary.bits_per_byte:.4f} |
| loss (nats per token) | {summary.validation_loss:.4f} |

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

## Samples

{samples}
"""


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
