"""Bits per byte of models beside yardsticks that know less, all on the same held-out bytes, and samples of text.

The yardsticks: every token equally likely; tokens by their frequency in the train split; and `xz -9e`, which, like a
compressor does, adapts to the text itself. The models and the first two predict the same tokens with the same tokenizer.
"""

import lzma
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import PipelineError
from model.evaluation import compare, evaluate
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset

XZ_MAX_BYTES = 8 << 20
CHUNK_TOKENS = 1 << 22


def measure_quality(
    models: Mapping[str, RexForCausalLM], dataset_dir: Path, settings: ExperimentSettings, *, log: Log = silent
) -> dict[str, Any]:
    """Bits per byte of each model and yardstick on `quality_windows` windows of the validation split.

    models: by name, the first one being the reference of `agreement`.
    """
    sequence_length, windows = settings.tokenizer.sequence_length, settings.benchmark.quality_windows
    dataset = TokenDataset(dataset_dir, "validation", sequence_length)
    evaluations = {name: evaluate(model, dataset, max_windows=windows, log=log) for name, model in models.items()}
    scored = next(iter(evaluations.values()))
    ids_T, text = held_out(dataset, windows)
    if (len(ids_T), len(text)) != (scored.tokens, scored.bytes):
        raise PipelineError(
            f"yardsticks see {len(ids_T)} tokens and {len(text)} bytes of {dataset_dir}, the models {scored.tokens} and "
            f"{scored.bytes}: expected the same; materialize the data set again"
        )
    counts_V = token_counts(np.memmap(dataset_dir / "train.bin", dataset.tokens.dtype, "r"), len(dataset.byte_counts))
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
        "yardsticks": {
            "uniform": len(ids_T) * math.log2(len(counts_V)) / len(text),
            "unigram": unigram_bits(counts_V, ids_T) / len(text),
            "xz": xz_bits(text) / len(text),
            "xz_whole_split": xz_bits(whole) / len(whole),
        },
        "xz_whole_split_bytes": len(whole),
    }


def held_out(dataset: TokenDataset, max_windows: int) -> tuple[np.ndarray, bytes]:
    """The tokens that `evaluate` predicts, shape (T,), and the bytes they stand for: of conversations, the responses."""
    step, count = dataset.sequence_length - 1, min(max_windows, len(dataset))
    labels = [dataset[i * len(dataset) // count]["labels"][1:].numpy() for i in range(count)]
    if dataset.responses is None and max_windows > len(dataset):  # the shorter window at the end
        labels.append(dataset.tokens[len(dataset) * step + 1 :].astype(np.int64))
    ids_T = np.concatenate(labels)
    ids_T = ids_T[ids_T >= 0]
    return ids_T, dataset.spelled(ids_T)


def token_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs, shape (V,); reads a memory-mapped split a piece at a time."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts_V += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts_V


def unigram_bits(counts_V: np.ndarray, ids_T: np.ndarray) -> float:
    """Bits that tokens `ids_T` cost under the frequencies `counts_V` of other text, plus one each."""
    bits_V = -np.log2((counts_V + 1) / (counts_V.sum() + len(counts_V)))
    return float(bits_V[ids_T].sum())


def xz_bits(text: bytes) -> int:
    """Size of `text` after `xz -9e`, in bits, header and checksum included."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


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
