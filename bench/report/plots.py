"""The two pictures of a report: latency with and without the KV cache, and tokens per second of every configuration."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: it holds global state and picks a window system

from bench.report.markdown import device_name

FULL_COLOR, QUANTIZED_COLOR, PEER_COLOR, SLOW_COLOR = "#1f5fa8", "#d9822b", "#8a8f98", "#b03a48"
INK, GRID = "#22262b", "#dfe3e8"


def plot_kv_cache(report: dict[str, Any], path: Path) -> None:
    """Milliseconds per token against the position in the text, with and without the KV cache; log scale."""
    full = report["models"]["full"]["label"]
    figure = Figure(figsize=(8.4, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines = []
    for row in report["latency"]:
        is_full = row["model"] == full
        if is_full or row["cache"]:
            median = [statistics.median(values) for values in zip(*row["rounds_ms"], strict=True)]
            smooth = running_median(median, max(3, len(median) // 24))
            color = QUANTIZED_COLOR if not is_full else FULL_COLOR if row["cache"] else SLOW_COLOR
            name = f"{row['model']}, {'with' if row['cache'] else 'without'} cache"
            lines.append((row["positions"], smooth, color, name))
    lines.sort(key=lambda line: -line[1][-1])
    for rank, (positions, smooth, color, name) in enumerate(lines):
        axes.plot(positions, smooth, color=color, linewidth=2.0)
        axes.annotate(
            f" {name}\n {smooth[-1]:{'.0f' if smooth[-1] >= 10 else '.2g'}} ms",
            (positions[-1], smooth[-1]),
            color=color,
            va="top" if rank == len(lines) - 1 else "bottom",  # the lowest line's label goes below it
            fontsize=9,
            annotation_clip=False,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    summary = report["summary"]
    axes.set_title(
        f"A PyTorch loop, {summary['kv_cache_tokens']:,} tokens: {summary['kv_cache_speedup']:.1f} times as fast with "
        "the KV cache",
        loc="left",
        fontsize=12,
        color=INK,
    )
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("latency per token (ms, log scale)")
    longest = report["summary"]["kv_cache_tokens"]
    axes.set_xlim(0, longest * 1.30)  # room for the labels
    axes.set_xticks([round(longest * i / 4) for i in range(5)])
    _finish(figure, axes, report, "both")
    figure.savefig(path)


def plot_comparison(report: dict[str, Any], path: Path) -> None:
    """Tokens per second of every configuration as horizontal bars: one sequence, then batches."""
    common, batch_tokens = report["settings"]["common_length"], report["settings"]["benchmark"]["batch_tokens"]
    full, quantized = report["models"]["full"]["label"], report["models"]["quantized"]["label"]
    single = [
        (f"{row['model']}, {row['engine']}", row["tokens_per_second"], row["model"])
        for row in report["engines"]
        if (row["sequences"], row["tokens"]) == (1, common)
    ]
    single += [
        (f"{row['model']}, {_loop(row['cache'])}", row["tokens_per_second"], row["model"])
        for row in report["decode"]
        if row["tokens"] == common
    ]
    single += [(f"{row['model']}, {row['loop']}", row["tokens_per_second"], "peer") for row in report["peers"]]
    sizes = sorted({row["batch_size"] for row in report["batch"]})
    sizes = [size for size in sizes if size > 1] or sizes
    timed = [
        (row["sequences"], row["tokens_per_second"], f"{row['model']}, {row['engine']}", row["model"])
        for row in report["engines"]
        if row["tokens"] == batch_tokens and row["sequences"] in sizes
    ]
    timed += [
        (row["batch_size"], row["tokens_per_second"], f"{row['model']}, {_loop(True)}", row["model"])
        for row in report["batch"]
        if row["batch_size"] in sizes
    ]
    timed.sort(key=lambda row: (row[0], -row[1]))
    batches = [(f"{size} × {name}", speed, model) for size, speed, name, model in timed]
    figure = Figure(figsize=(8.4, 1.6 + 0.33 * (len(single) + len(batches))), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[len(single), len(batches)])
    titles = (
        f"One sequence, {common:,} tokens",
        f"Batches of {_listed(sizes)} sequences, {batch_tokens:,} tokens each, all sequences together",
    )
    for axes, bars, title in zip((upper, lower), (single, batches), titles, strict=True):
        if title == titles[0]:
            bars = sorted(bars, key=lambda bar: -bar[1])
        colors = [{full: FULL_COLOR, quantized: QUANTIZED_COLOR}.get(kind, PEER_COLOR) for _, _, kind in bars]
        drawn = axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color=colors, height=0.72)
        axes.bar_label(drawn, [f"{value:,.0f}" for _, value, _ in bars], padding=3, fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _finish(figure, axes, report, "x")
    lower.set_xlabel("tokens per second")
    figure.savefig(path)


def _loop(has_cache: bool) -> str:
    return f"PyTorch loop with{'' if has_cache else 'out'} cache"


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def running_median(values: list[float], window: int) -> list[float]:
    """Median of the `window` values around each, fewer at the ends; same length. The raw rounds are in report.json."""
    half = window // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _finish(figure: Figure, axes: Any, report: dict[str, Any], grid: str) -> None:
    axes.grid(axis=grid, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    figure.supxlabel(
        f"{report['experiment']}: {report['models']['full']['parameters']:,} parameters, {device_name(report)}, "
        f"torch {report['hardware']['torch']}",
        fontsize=8,
        color="#5b626b",
        x=0.01,
        ha="left",
    )
