"""Renders report.json as a Markdown page: a short summary, then tables. Nothing is measured here."""

from collections.abc import Sequence
from typing import Any


def render(report: dict[str, Any]) -> str:
    """The report in GitHub's Markdown; it links the two plots in the same folder."""
    sections = [
        _summary(report),
        "![Latency per token with and without the KV cache](kv_cache.png)",
        "![Tokens per second of every configuration](model_benchmark_comparison.png)",
        _quality(report),
        _engines(report),
        _decode(report),
        _prefill_and_batches(report),
        _memory(report),
        *([_export(report["export"])] if report["export"] else []),
        _samples(report),
        _conditions(report),
    ]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column aligned left and the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(report: dict[str, Any]) -> str:
    full, quantized, numbers = report["models"]["full"], report["models"]["quantized"], report["summary"]
    lost = round(numbers["bits_per_byte_quantized"] - numbers["bits_per_byte"], 4) + 0.0  # + 0.0 turns -0.0 into 0.0
    description = f"{report['description']}. " if report["description"] else ""
    return f"""# Benchmark of {report["experiment"]}

{description}A decoder of {full["parameters"]:,} parameters ({full["num_hidden_layers"]} layers, hidden size \
{full["hidden_size"]}, vocabulary {full["vocab_size"]:,}, context {full["max_position_embeddings"]:,} tokens) on \
{device_name(report)}.

- **Quality:** {numbers["bits_per_byte"]:.3f} bits per byte of held-out text; `xz -9e` needs \
{numbers["bits_per_byte_xz"]:.3f} ({numbers["bits_per_byte_xz_whole_split"]:.3f} given the whole split at once), \
token frequencies alone {numbers["bits_per_byte_unigram"]:.3f}.
- **Speed:** {numbers["decode_tokens_per_second"]:,.0f} tokens/s for one sequence of {numbers["decode_tokens"]:,} \
tokens, {numbers["batch_tokens_per_second"]:,.0f} in a batch{_beside(report)}.
- **{_capital(quantized["label"])}:** {full["weights_bytes"] / quantized["weights_bytes"]:.2f} times smaller, \
{numbers["quantized_speedup"]:.2f} times the speed for one sequence, \
{numbers["batch_tokens_per_second_quantized"] / numbers["batch_tokens_per_second"]:.2f} times in a \
batch, {lost:+.4f} bits per byte.
- **KV cache:** {numbers["kv_cache_tokens"]:,} tokens are generated {numbers["kv_cache_speedup"]:.1f} times as fast \
with it as without."""


def _beside(report: dict[str, Any]) -> str:
    """llama.cpp's figures in a sentence, where it was measured."""
    numbers = report["summary"]
    if report["llama_cpp_left_out"]:
        return ""
    return (
        f"; llama.cpp (F32) {numbers['llama_cpp_f32']:,.0f} and "
        f"{numbers['llama_cpp_f32_batch']:,.0f}, (Q8_0) "
        f"{numbers['llama_cpp_q8_0']:,.0f} and "
        f"{numbers['llama_cpp_q8_0_batch']:,.0f}"
    )


def _quality(report: dict[str, Any]) -> str:
    quality = report["quality"]
    baselines = quality["baselines"]
    rows = [(name, score["bits_per_byte"], f"{score['perplexity']:.2f}") for name, score in quality["models"].items()]
    rows += [
        ("`xz -9e`, the same text", baselines["xz"], ""),
        (f"`xz -9e`, {quality['xz_whole_split_bytes']:,} bytes of the split", baselines["xz_whole_split"], ""),
        ("token frequencies of the train split", baselines["unigram"], ""),
        ("every token equally likely", baselines["uniform"], ""),
    ]
    agreement = "\n\n".join(
        f"{_capital(name)} finds the same top token as full precision at {100 * values['top1_agreement']:.2f} % of "
        f"positions; KL divergence {values['kl_divergence']:.6f} nats per token."
        for name, values in quality["agreement"].items()
    )
    return f"""## Quality

Bits per byte of raw text, lower is better; on {quality["windows"]:,} windows of {quality["sequence_length"]:,} \
tokens, evenly spread over the validation split ({quality["tokens"]:,} tokens, {quality["bytes"]:,} bytes). The cost \
of predicting where documents end is included for all but `xz`, which gets the text in one piece.

{table(["", "bits per byte", "perplexity per token"], [(name, f"{bits:.4f}", extra) for name, bits, extra in rows])}

{agreement}"""


def _engines(report: dict[str, Any]) -> str:
    rows = [
        (
            f"{row['model']}, {row['engine']}",
            str(row["sequences"]),
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_token']:.3f}",
            _spread(row),
        )
        for row in report["engines"]
    ]
    left_out = report["llama_cpp_left_out"]
    peer = f"llama.cpp is left out: {left_out}." if left_out else "llama.cpp has the same weights, at its best setting."
    return f"""## The engine that serves

Greedy, from prompts of one token, without proposed tokens; tokens/s over all sequences from the first token on, by \
the {report["step"]} step. {peer}

{table(["", "sequences", "tokens of each", "tokens/s", "ms per step", "spread"], rows)}"""


def _decode(report: dict[str, Any]) -> str:
    rows = [
        (
            f"{row['model']}, {'with' if row['cache'] else 'without'} cache",
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['ms_per_token']:.3f}",
            _spread(row),
            str(row["repeats"]),
        )
        for row in sorted(report["decode"], key=lambda r: (r["model"] != "full precision", not r["cache"], r["tokens"]))
    ]
    peers = [
        (
            f"{row['model']}, {row['loop']}",
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['ms_per_token']:.3f}",
            _spread(row),
            str(row["repeats"]),
        )
        for row in report["peers"]
    ]
    header = ["", "tokens", "tokens/s", "ms per token", "spread", "repeats"]
    return f"""## A plain loop

What the KV cache saves: one sequence by PyTorch, greedy, from a prompt of one token. Medians of interleaved rounds; \
spread is (slowest - fastest) / median. With the cache every token is timed. Without it the time of a token depends on \
the number of tokens before it, so one of {report["settings"]["uncached_every"]} positions is timed and represents its \
neighbors; the command under Conditions times them all.

{table(header, rows)}

Peers, float32 with their own KV cache: transformers' `LlamaForCausalLM` with the same sizes and random weights, and \
transformers' `generate()`.

{table(header, peers)}"""


def _prefill_and_batches(report: dict[str, Any]) -> str:
    prefill = [
        (row["model"], f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}", f"{sum_ms(row):.2f}", _spread(row))
        for row in report["prefill"]
    ]
    batches = [
        (
            row["model"],
            str(row["batch_size"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_token']:.3f}",
            _spread(row),
        )
        for row in report["batch"]
    ]
    return f"""## Prefill

A prompt read in one pass into an empty KV cache.

{table(["", "prompt tokens", "tokens/s", "ms", "spread"], prefill)}

## Batches

{report["settings"]["benchmark"]["batch_tokens"]:,} tokens for each sequence by the plain loop with the KV cache; \
tokens/s over all sequences.

{table(["", "sequences", "tokens/s", "ms per step", "spread"], batches)}"""


def _memory(report: dict[str, Any]) -> str:
    rows = [
        (
            f"{row['model']}, {'with' if row['cache'] else 'without'} cache",
            _megabytes(row["peak_bytes"]),
            _megabytes(row["peak_bytes"] - row["baseline_bytes"]),
            _megabytes(row["peak_gpu_bytes"]) if row["peak_gpu_bytes"] else "",
        )
        for row in report["memory"]
    ]
    sizes = [
        (model["label"], f"{model['weights_bytes']:,}", _megabytes(model["weights_bytes"]))
        for model in report["models"].values()
    ]
    return f"""## Memory and size

Peak resident memory of a process that loads the model and decodes {report["memory"][0]["tokens"]:,} tokens, each \
configuration in its own; the second column excludes the memory of the imported libraries.

{table(["", "peak, MB", "beyond the imports, MB", "GPU, MB"], rows)}

{table(["model.safetensors", "bytes", "MB"], sizes)}"""


def _export(export: dict[str, Any]) -> str:
    rows = [
        (
            f"`{row['file']}`",
            row["engine"],
            _megabytes(row["bytes"]),
            f"{row['bits_per_byte']:.4f}",
            f"{row['bits_per_byte_difference']:.1g}",
            f"{row['log_probability_difference']:.1g}",
            f"{len(row['differences'])}",
        )
        for row in export["certificates"]
    ]
    header = ["file", "engine", "MB", "bits per byte", "difference", "nats", "beyond the bounds"]
    left_out = [f"Left out: {reason}." for reason in export["left_out"]]
    text = f"""## In other engines

Each file of the exported model, run by its engine. Bits per byte are of other windows of the validation split than \
above. Their difference, and the largest one of a log-probability in nats, are to this project's model with the same \
weights; the bounds are in `certificates.json`.

{table(header, rows)}"""
    return "\n\n".join([text, *left_out])


def _samples(report: dict[str, Any]) -> str:
    """Samples in code fences longer than any run of backticks in them."""
    parts = []
    for sample in report["samples"]:
        text = sample["prompt"] + sample["text"]
        fence = "`" * max(3, 1 + max((len(run) for run in _backticks(text)), default=0))
        parts.append(
            f"{_capital(sample['model'])}, prompt `{sample['prompt'].strip()}`:\n\n{fence}text\n{text}\n{fence}"
        )
    return "## Samples\n\nTemperature 0.8, top-k 50, the same seed.\n\n" + "\n\n".join(parts)


def _backticks(text: str) -> list[str]:
    return "".join(character if character == "`" else " " for character in text).split()


def _conditions(report: dict[str, Any]) -> str:
    machine, benchmark = report["hardware"], report["settings"]["benchmark"]
    rows = [
        ("processor", machine["processor"]),
        ("device", machine["device"]),
        ("torch threads, usable cores", f"{machine['torch_threads']}, {machine['usable_cores']}"),
        ("memory", f"{machine['memory_bytes'] / 1e9:.1f} GB"),
        ("load average before the start", f"{machine['load_average']:.2f}"),
        ("system, Python", f"{machine['system']}, {machine['python']}"),
        ("torch, transformers", f"{machine['torch']}, {machine['transformers']}"),
        ("date", machine["date"]),
    ]
    options = " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in benchmark.items()
    )
    return f"""## Conditions

{table(["", ""], rows)}

To measure the same artifacts again:

```sh
python -m bench.report CHECKPOINT_DIR QUANTIZED_DIR DATASET_DIR OUTPUT_DIR --name {report["experiment"]} \\
  {options}
```

The KV cache alone: `python -m bench.decode CHECKPOINT_DIR --tokens {report["summary"]["kv_cache_tokens"]}`. \
All rounds are in `report.json`."""


def sum_ms(row: dict[str, Any]) -> float:
    """Milliseconds of a complete run."""
    return float(row["ms_per_token"] * row["tokens"])


def device_name(report: dict[str, Any]) -> str:
    """The GPU's name, or the number of CPU cores."""
    machine = report["hardware"]
    cores = machine["usable_cores"]
    return str(machine["device"]) if machine["device"] != "cpu" else f"{cores} CPU core{'s' if cores > 1 else ''}"


def _spread(row: dict[str, Any]) -> str:
    rounds = sorted(row["rounds_s"])
    if len(rounds) < 2:
        return ""
    return f"{100 * (rounds[-1] - rounds[0]) / rounds[len(rounds) // 2]:.0f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
