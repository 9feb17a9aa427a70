"""The benchmark report of an experiment, measured on its artifacts: quality, speed and memory of both models.

    python -m bench.report CHECKPOINT_DIR QUANTIZED_DIR DATASET_DIR OUTPUT_DIR [--exported EXPORTED_DIR]

writes report.json (everything, raw rounds included), report.md, kv_cache.png and model_benchmark_comparison.png.
`bench/report/speed.py` has the timings and `bench/report/quality.py` the scores; this file assembles the report.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import hardware
from bench.decode import check_length
from bench.report.engines import ENGINE, LLAMA_CPP
from bench.report.llama_cpp import KINDS
from bench.report.markdown import render
from bench.report.memory import Configuration, measure_peaks
from bench.report.plots import plot_comparison, plot_kv_cache
from bench.report.quality import measure_quality, write_samples
from bench.report.speed import FULL, common_length, measure_speed, uncached_every
from model.configuration_rex import RexConfig
from model.errors import PipelineError, ends_in_one_line, limits_as_error
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import BenchmarkSettings, ExperimentSettings, ModelSettings, ServingSettings, TokenizerSettings
from model.system.devices import resolve_device
from model.weights import int8
from model.weights.loading import WEIGHTS, load_model, read_config, read_method

SCHEMA_VERSION = 3


def build_report(
    settings: ExperimentSettings,
    checkpoint_dir: Path,
    quantized_dir: Path,
    dataset_dir: Path,
    output_dir: Path,
    *,
    exported_dir: Path | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Measure both models on `settings.serving.device`, write the four files to `output_dir`, return report.json.

    exported_dir: the model for other engines, whose files and certificates are listed. The key `summary` holds the
    headline numbers, flat. Speeds are in tokens per second, latencies in milliseconds, sizes in bytes. Raises
    PipelineError if a directory cannot be loaded or a length exceeds the model's context.
    """
    device = resolve_device(settings.serving.device, setting="serving.device")
    directories = {"full": checkpoint_dir, "quantized": quantized_dir}
    labels = {"full": FULL, "quantized": _label(read_method(quantized_dir))}
    loaded = {key: load_model(path, device=str(device)) for key, path in directories.items()}
    _check_lengths(settings, loaded["full"].config)
    models = {labels[key]: model for key, model in loaded.items()}
    threads = hardware.torch_threads(int8.count_parameters(loaded["full"]))
    with _threads(threads):
        machine = hardware.describe(device)  # before the work, so that the load average shows only other processes
        log(f"benchmark: {labels['full']} and {labels['quantized']} on {device}, {threads} threads")
        log("benchmark: quality and peak memory")
        with ThreadPoolExecutor(1) as background:  # neither task is timed
            memory = background.submit(_memory, settings, directories, labels, str(device), threads)
            with _threads(hardware.all_threads()):
                quality = measure_quality(models, dataset_dir, settings, log=log)
        log("benchmark: speed")
        most, tokenizer_dir = hardware.all_threads(), dataset_dir / "tokenizer"
        speed = measure_speed(models, settings.benchmark, checkpoint_dir, tokenizer_dir, most, log=log)
        samples = write_samples(models, tokenizer_dir, settings)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "experiment": settings.name,
        "description": settings.description,
        "hardware": machine,
        "settings": {
            "benchmark": asdict(settings.benchmark),
            "common_length": common_length(settings.benchmark),
            "uncached_every": uncached_every(settings.benchmark),
        },
        "models": {key: _describe(labels[key], model, directories[key]) for key, model in loaded.items()},
        "quality": quality,
        **speed,
        "memory": memory.result(),
        "samples": samples,
        "export": read_export(exported_dir) if exported_dir else None,
    }
    report["summary"] = summarize(report)
    with limits_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (output_dir / "report.md").write_text(render(report), encoding="utf-8")
        plot_kv_cache(report, output_dir / "kv_cache.png")
        plot_comparison(report, output_dir / "model_benchmark_comparison.png")
    headline = report["summary"]
    log(
        f"benchmark: {headline['bits_per_byte']:.3f} bits per byte, {headline['decode_tokens_per_second']:,.0f} "
        f"tokens/s, {labels['quantized']} {headline['decode_tokens_per_second_quantized']:,.0f}; "
        f"{headline['kv_cache_speedup']:.1f} times as fast with the KV cache"
    )
    return report


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers, flat, for plots over time."""
    full, quantized = report["models"]["full"], report["models"]["quantized"]
    quality, common = report["quality"], report["settings"]["common_length"]
    batch_tokens = report["settings"]["benchmark"]["batch_tokens"]

    def engine(name: str, weights: str) -> dict[str, float]:
        """Speed for one sequence, and the highest in a batch."""
        rows = [row for row in report["engines"] if (row["engine"], row["model"]) == (name, weights)]
        one = next(row for row in rows if row["sequences"] == 1 and row["tokens"] == common)
        batches = [row["tokens_per_second"] for row in rows if row["tokens"] == batch_tokens]
        return {"decode": one["tokens_per_second"], "batch": max(batches)}

    def loop(cache: bool, tokens: int) -> float:
        rows = [r for r in report["decode"] if (r["model"], r["cache"], r["tokens"]) == (full["label"], cache, tokens)]
        return float(rows[0]["tokens_per_second"])

    longest = max(row["tokens"] for row in report["decode"])
    scores = {label: score["bits_per_byte"] for label, score in quality["models"].items()}
    ours = {
        suffix: engine(ENGINE, label) for suffix, label in (("", full["label"]), ("_quantized", quantized["label"]))
    }
    return {
        "parameters": full["parameters"],
        "bits_per_byte": scores[full["label"]],
        "bits_per_byte_quantized": scores[quantized["label"]],
        "bits_per_byte_xz": quality["baselines"]["xz"],
        "bits_per_byte_xz_whole_split": quality["baselines"]["xz_whole_split"],
        "bits_per_byte_unigram": quality["baselines"]["unigram"],
        "bits_per_byte_uniform": quality["baselines"]["uniform"],
        "decode_tokens": common,
        **{f"{work}_tokens_per_second{suffix}": ours[suffix][work] for work in ("decode", "batch") for suffix in ours},
        "quantized_speedup": ours["_quantized"]["decode"] / ours[""]["decode"],
        "loop_tokens_per_second": loop(True, common),
        "kv_cache_tokens": longest,
        "kv_cache_speedup": loop(True, longest) / loop(False, longest),
        **(_llama_cpp(engine) if not report["llama_cpp_left_out"] else {}),
        "weights_bytes": full["weights_bytes"],
        "weights_bytes_quantized": quantized["weights_bytes"],
        "peak_memory_bytes": _peak(report, full["label"]),
        "peak_memory_bytes_quantized": _peak(report, quantized["label"]),
    }


def _llama_cpp(engine: Callable[[str, str], dict[str, float]]) -> dict[str, float]:
    """Tokens per second; the UI cuts off longer names."""
    found = {kind: engine(LLAMA_CPP, kind) for kind in KINDS}
    return {
        **{f"llama_cpp_{kind.lower()}": speeds["decode"] for kind, speeds in found.items()},
        **{f"llama_cpp_{kind.lower()}_batch": speeds["batch"] for kind, speeds in found.items()},
    }


def _peak(report: dict[str, Any], label: str) -> int:
    return int(next(row["peak_bytes"] for row in report["memory"] if row["model"] == label and row["cache"]))


def _label(method: str) -> str:
    return "not quantized" if method == "none" else method


def _describe(label: str, model: RexForCausalLM, directory: Path) -> dict[str, Any]:
    return {
        "label": label,
        "parameters": int8.count_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": (directory / WEIGHTS).stat().st_size,
        "hidden_size": model.config.hidden_size,
        "num_hidden_layers": model.config.num_hidden_layers,
        "vocab_size": model.config.vocab_size,
        "max_position_embeddings": model.config.max_position_embeddings,
    }


def _check_lengths(settings: ExperimentSettings, config: RexConfig) -> None:
    benchmark = settings.benchmark
    check_length("benchmark.generated_tokens", max(benchmark.generated_tokens), config)
    check_length("benchmark.prefill_tokens", max(benchmark.prefill_tokens), config)
    check_length("benchmark.batch_tokens", benchmark.batch_tokens, config)
    check_length("tokenizer.sequence_length", settings.tokenizer.sequence_length, config)


def _memory(
    settings: ExperimentSettings, directories: dict[str, Path], labels: dict[str, str], device: str, threads: int
) -> list[dict[str, Any]]:
    longest = max(settings.benchmark.generated_tokens)
    configurations = [
        Configuration(labels[key], str(directory), cache, longest, device, threads)
        for key, directory in directories.items()
        for cache in (True, False)
    ]
    # The report contains no local paths.
    return [{k: v for k, v in row.items() if k != "model_dir"} for row in measure_peaks(configurations)]


def read_export(exported_dir: Path) -> dict[str, Any]:
    """Sizes and certificates of the files for other engines. Raises PipelineError if there are none."""
    path = exported_dir / "certificates.json"
    if not path.is_file():
        raise PipelineError(f"no {path.name} in {exported_dir}: expected an exported model; materialize it first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        **found,
        "certificates": [{**row, "bytes": _size(exported_dir / row["file"])} for row in found["certificates"]],
    }


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@ends_in_one_line
def main() -> int:
    """Measure an experiment's artifacts and write its report."""
    defaults = BenchmarkSettings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint_dir", type=Path, help="directory of the trained checkpoint")
    parser.add_argument("quantized_dir", type=Path, help="directory of the quantized model")
    parser.add_argument("dataset_dir", type=Path, help="directory of the tokenized dataset")
    parser.add_argument("output_dir", type=Path, help="where the four files go")
    parser.add_argument("--exported", type=Path, help="directory of the exported model, for its certificates")
    parser.add_argument("--name", default="experiment", help="the experiment's name, for the title")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to measure")
    for name, value in asdict(defaults).items():
        nargs = "+" if isinstance(value, list) else None
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, nargs=nargs, default=value, help=f"benchmark.{name}"
        )
    arguments = parser.parse_args()
    build_report(
        settings_of(arguments.checkpoint_dir, arguments.dataset_dir, arguments),
        arguments.checkpoint_dir,
        arguments.quantized_dir,
        arguments.dataset_dir,
        arguments.output_dir,
        exported_dir=arguments.exported,
        log=print,
    )
    print(arguments.output_dir / "report.md")
    return 0


def settings_of(checkpoint_dir: Path, dataset_dir: Path, options: argparse.Namespace) -> ExperimentSettings:
    """Settings for artifacts alone: the context from the checkpoint, the window from the dataset, the rest from the
    arguments.
    """
    summary = dataset_dir / "summary.json"
    if not summary.is_file():
        raise PipelineError(f"{summary} is missing: expected a tokenized dataset")
    return ExperimentSettings(
        name=options.name,
        tokenizer=TokenizerSettings(sequence_length=json.loads(summary.read_text("utf-8"))["sequence_length"]),
        model=ModelSettings(max_position_embeddings=read_config(checkpoint_dir).max_position_embeddings),
        benchmark=BenchmarkSettings(**{name: getattr(options, name) for name in asdict(BenchmarkSettings())}),
        serving=ServingSettings(device=options.device),
    )
