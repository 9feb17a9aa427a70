"""Bits per byte of the models and of the baselines of `model/baselines.py` on the same held-out bytes; text samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.baselines import token_baselines, xz_bits
from model.errors import PipelineError
from model.evaluation import compare, evaluate
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset

XZ_MAX_BYTES = 8 << 20


def measure_quality(
    models: Mapping[str, RexForCausalLM], dataset_dir: Path, settings: ExperimentSettings, *, log: Log = silent
) -> dict[str, Any]:
    """Bits per byte of each model and baseline on `quality_windows` windows of the validation split.

    models: by name, the first one being the reference of `agreement`.
    """
    sequence_length, windows = settings.tokenizer.sequence_length, settings.benchmark.quality_windows
    dataset = TokenDataset(dataset_dir, "validation", sequence_length)
    evaluations = {name: evaluate(model, dataset, max_windows=windows, log=log) for name, model in models.items()}
    scored = next(iter(evaluations.values()))
    baselines = token_baselines(dataset_dir, sequence_length, windows)
    if (baselines.tokens, len(baselines.text)) != (scored.tokens, scored.bytes):
        raise PipelineError(
            f"baselines see {baselines.tokens} tokens and {len(baselines.text)} bytes of {dataset_dir}, the models "
            f"{scored.tokens} and {scored.bytes}: expected the same; materialize the dataset again"
        )
    whole = dataset.text_bytes(0, len(dataset.tokens))[:XZ_MAX_BYTES]
    reference, *others = models
    return {
        "windows": min(windows, len(dataset)),
        "sequence_length": sequence_length,
        "tokens": scored.tokens,
        "bytes": scored.bytes,
        "models": {
            name: {"bits_per_byte": result.bits_per_byte, "perplexity": result.perplexity, "loss": result.loss}
            for name, result in evaluations.items()
        },
        "agreement": {
            name: vars(compare(models[name], models[reference], dataset, max_windows=max(1, windows // 4)))
            for name in others
        },
        "baselines": {
            "uniform": baselines.uniform,
            "unigram": baselines.unigram,
            "xz": xz_bits(baselines.text) / len(baselines.text),
            "xz_whole_split": xz_bits(whole) / len(whole),
        },
        "xz_whole_split_bytes": len(whole),
    }


@torch.inference_mode()
def write_samples(models: Mapping[str, Any], tokenizer_dir: Path, settings: ExperimentSettings) -> list[dict[str, str]]:
    """One sampled continuation of each of `training.sample_prompts` by each model; the same seed for all."""
    tokenizer = load_tokenizer(tokenizer_dir)
    samples = []
    for text in settings.training.sample_prompts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        for name, model in models.items():
            room = model.config.max_position_embeddings - len(ids)
            if min(settings.training.sample_tokens, room) < 1:
                continue
            prompt_BT = torch.tensor([ids], device=model.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.training.seed)
                output_BT = model.generate(
                    prompt_BT,
                    attention_mask=torch.ones_like(prompt_BT),
                    max_new_tokens=min(settings.training.sample_tokens, room),
                    do_sample=True,
                    temperature=0.8,
                    top_k=50,
                    pad_token_id=tokenizer.pad_token_id,
                )
            written = str(tokenizer.decode(output_BT[0, len(ids) :], skip_special_tokens=True))
            samples.append({"model": name, "prompt": text, "text": written})
    return samples
