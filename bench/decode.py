"""Greedy decoding in a plain loop over the model, timed token by token, with and without a KV cache.

    python -m bench.decode MODEL_DIR --tokens 1024

prints the speedup of the cache and a JSON line for machines. The loop represents any engine: it adds only the argmax to
the model's forward pass. The first token comes from a prompt of one token.

Shapes: B sequences, T tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from bench.hardware import describe, torch_threads
from model.errors import PipelineError, ends_in_one_line
from model.progress import Log, Progress, silent
from model.weights.int8 import count_parameters
from model.weights.loading import load_model


def clock(device: torch.device) -> float:
    """Current time in seconds, read after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt_BT: Tensor,
    new_tokens: int,
    *,
    use_cache: bool,
    on_token: Callable[[int], None] = lambda position: None,
) -> tuple[Tensor, list[float]]:
    """Greedy tokens (B, new_tokens) and the seconds per position; the first includes the prompt's pass.

    on_token: called with the number of tokens made so far. End-of-text does not stop decoding, so that every run does
    the same work. Without the cache each token recomputes all earlier tokens; in both cases logits are computed for the
    last position only.
    """
    cache = DynamicCache(config=model.config) if use_cache else None
    ids_BT, tokens, seconds = prompt_BT, [], []
    for _ in range(new_tokens):
        started = clock(model.device)
        output = model(ids_BT, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        next_B1 = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        ids_BT = next_B1 if use_cache else torch.cat([ids_BT, next_B1], dim=1)
        seconds.append(clock(model.device) - started)
        tokens.append(next_B1)
        on_token(len(tokens))
    return torch.cat(tokens, dim=1), seconds


@torch.inference_mode()
def generate(model: Any, prompt_BT: Tensor, new_tokens: int) -> float:
    """Seconds that transformers' own `generate()` takes for the same greedy tokens with its KV cache."""
    started = clock(model.device)
    model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=model.config.pad_token_id or 0,
    )
    return clock(model.device) - started


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompt_BT: Tensor) -> float:
    """Seconds to read a prompt in one pass into an empty KV cache, up to the logits of the next token."""
    started = clock(model.device)
    model(prompt_BT, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return clock(model.device) - started


def llama_of_equal_shape(config: PreTrainedConfig, device: torch.device) -> LlamaForCausalLM:
    """Transformers' own Llama with REX's sizes and random weights, whose values do not change the speed."""
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(llama).eval().requires_grad_(False).to(device)


def prompt(model: PreTrainedModel, tokens: int = 1, batch: int = 1) -> Tensor:
    """A prompt (B, T) that starts with the model's first token and goes on with arbitrary ones."""
    ids_T = torch.arange(tokens) * 7919 % model.config.vocab_size
    ids_T[0] = model.config.bos_token_id or 0
    return ids_T.repeat(batch, 1).to(model.device)


def check_length(name: str, tokens: int, config: PreTrainedConfig) -> None:
    """Raise PipelineError if a measurement would exceed the context."""
    if tokens > config.max_position_embeddings:
        raise PipelineError(
            f"{name} is {tokens}: expected at most the model's max_position_embeddings "
            f"({config.max_position_embeddings}); measure fewer tokens"
        )


def measure_kv_cache(
    model_dir: Path, tokens: int, repeats: int, *, device: str = "cpu", log: Log = silent
) -> dict[str, Any]:
    """Seconds for `tokens` tokens with and without the cache, in interleaved rounds, and the ratio of the medians.

    Raises PipelineError if `tokens` exceeds the model's context or the directory cannot be loaded.
    """
    model = load_model(model_dir, device=device)
    torch.set_num_threads(torch_threads(count_parameters(model)))
    check_length("--tokens", tokens, model.config)
    for use_cache in (True, False):
        decode(model, prompt(model), min(16, tokens), use_cache=use_cache)  # warm-up
    rounds: dict[str, list[float]] = {"with_cache_s": [], "without_cache_s": []}
    same = True
    for number in range(1, repeats + 1):
        with_cache, seconds = decode(model, prompt(model), tokens, use_cache=True)
        rounds["with_cache_s"].append(sum(seconds))
        label = f"round {number} of {repeats}, without cache"
        progress = Progress(log, label, tokens * (tokens + 1) / 2, "recomputed positions")
        without, seconds = decode(model, prompt(model), tokens, use_cache=False, on_token=progress.advance)
        rounds["without_cache_s"].append(sum(seconds))
        same = same and torch.equal(with_cache, without)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        "model_dir": str(model_dir),
        "tokens": tokens,
        "repeats": repeats,
        "rounds": rounds,
        "with_cache_tokens_per_second": tokens / medians["with_cache_s"],
        "without_cache_tokens_per_second": tokens / medians["without_cache_s"],
        "speedup": medians["without_cache_s"] / medians["with_cache_s"],
        "same_tokens": same,
        "hardware": describe(model.device),
    }


@ends_in_one_line
def main() -> int:
    """Measure the speedup of the KV cache on a model directory."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=main.__doc__)
    parser.add_argument("model_dir", type=Path, help="a trained checkpoint or a quantized model")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to generate (default: 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    arguments = parser.parse_args()
    result = measure_kv_cache(
        arguments.model_dir, arguments.tokens, arguments.repeats, device=arguments.device, log=print
    )
    print(
        f"{arguments.tokens} tokens, {arguments.repeats} rounds, {result['hardware']['torch_threads']} threads: "
        f"{result['with_cache_tokens_per_second']:.0f} tokens/s with the KV cache, "
        f"{result['without_cache_tokens_per_second']:.0f} without: {result['speedup']:.1f} times as fast"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
