"""Plots the loss curve of a training."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_loss(history: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of training and validation loss (nats per token) over optimizer steps.

    history: entries with "step" and "loss" or "eval_loss". With enough points, the y axis omits the initial drop, which
    would flatten the rest.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")  # no pyplot: it keeps global state per process
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = {"training": ("loss", "#9db4c8", 1.2), "validation": ("eval_loss", "#c1440e", 2.0)}
    values: list[float] = []
    for label, (key, color, width) in series.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            marker = "o" if key == "eval_loss" else ""
            axes.plot(
                *zip(*points, strict=True), label=label, color=color, linewidth=width, marker=marker, markersize=4
            )
            values += [value for _, value in points]
            if key == "eval_loss":
                axes.annotate(
                    f"{points[-1][1]:.3f}", points[-1], xytext=(4, 6), textcoords="offset points", color=color
                )
    if len(values) > 20:
        ordered = sorted(values)
        low, high = ordered[0], ordered[int(0.95 * (len(ordered) - 1))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
