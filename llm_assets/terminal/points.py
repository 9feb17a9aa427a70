"""The points of a sweep: their overrides, their scores, and the table that marks the best."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_assets.artifacts.store import ArtifactStore
from llm_assets.paths import shown_path, var_dir
from llm_assets.resources.tracking_store import one_line
from llm_assets.terminal.view import WIDTH


@dataclass
class Point:
    """One point: an experiment with overrides. Numbers that its run did not make are None."""

    experiment: str
    overrides: Sequence[str] = ()
    bits_per_byte: float | None = None
    """Of the trained model, on the whole validation split."""
    tokens_per_second: float | None = None
    """Decoding one text with the trained model."""
    quantized_bytes: int | None = None
    failed: bool = False

    @property
    def name(self) -> str:
        """As `make sweep` takes it."""
        return " ".join([self.experiment, *self.overrides])


class Sweep:
    """Collects points and writes their table to var/sweeps/NAME.md and .json."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.name = f"{datetime.now():%Y%m%d-%H%M%S}"
        self._command = shlex.join(arguments)
        self.points: list[Point] = []

    def begin(self, experiment: str, overrides: Sequence[str] = ()) -> int:
        """Start a point; returns its number, from 1."""
        self.points.append(Point(experiment, overrides))
        return len(self.points)

    def fail(self) -> None:
        """Mark the point as failed."""
        self.points[-1].failed = True

    def finish(self, experiment: str, *, is_whole: bool = True) -> float:
        """Read the results in the point's artifacts; returns its bits per byte.

        is_whole: the run made every artifact; else those after the checkpoint are of other runs.
        """
        store, point = ArtifactStore.default(), self.points[-1]

        def read(asset: str, file: str = "summary.json") -> dict[str, Any]:
            found: dict[str, Any] = json.loads((store.load(asset, experiment) / file).read_text())
            return found

        point.bits_per_byte = float(read("trained_checkpoint")["bits_per_byte"])
        if is_whole:
            report = read("benchmark_report", "report.json")["summary"]
            point.tokens_per_second = float(report["decode_tokens_per_second"])
            point.quantized_bytes = int(read("quantized_model")["bytes_after"])
        return point.bits_per_byte

    @property
    def best(self) -> Point | None:
        """The point with the fewest bits per byte, the first one in a tie; None if none was scored."""
        scored = [point for point in self.points if point.bits_per_byte is not None]
        return min(scored, key=lambda point: point.bits_per_byte or 0.0) if scored else None

    def close(self) -> None:
        """Print the table, write it and log it to MLflow; does nothing if no point was scored."""
        best = self.best
        if best is None:
            return
        print(f"\n{self.as_text()}\n\nbest: {best.name}")
        folder = var_dir() / "sweeps"
        folder.mkdir(parents=True, exist_ok=True)
        page, data = folder / f"{self.name}.md", folder / f"{self.name}.json"
        page.write_text(f"# Sweep {self.name}\n\n`{self._command}`\n\n{self.as_markdown()}\n\nBest: `{best.name}`\n")
        record = {"arguments": self._command, "best": best.name, "points": self._records()}
        data.write_text(json.dumps(record, indent=2) + "\n")
        print(f"table: {shown_path(page)}")
        try:
            self._log(best, [page, data])
        except Exception as error:  # noqa: BLE001 - a tracking store may raise anything; the table is on disk
            print(f"MLflow did not accept the table: {one_line(error)}")

    def as_text(self) -> str:
        """The table for a terminal of 80 columns: numbers first. Words that all points share appear once."""
        words = [[point.experiment, *point.overrides] for point in self.points]
        common = [word for word in words[0] if all(word in others for others in words)] if len(words) > 1 else []
        lines = textwrap.wrap(f"all points: {' '.join(common)}", WIDTH, subsequent_indent="    ") if common else []
        lines.append(f"{'':2}{'#':>3} {'bits/byte':>10} {'tokens/s':>9} {'MB':>8}  point")
        for number, (point, named) in enumerate(zip(self.points, words, strict=True), start=1):
            mark = "* " if point is self.best else "  "
            left = f"{mark}{number:>3} {' '.join(_cells(point, (10, 9, 8)))}  "
            own = " ".join(word for word in named if word not in common)
            first, *further = textwrap.wrap(own, WIDTH - len(left), break_on_hyphens=False) or [""]
            lines += [left + first, *(" " * len(left) + line for line in further)]
        return "\n".join(lines)

    def as_markdown(self) -> str:
        """The table as Markdown."""
        lines = ["| | point | bits per byte | tokens/s | quantized, MB |", "|---:|---|---:|---:|---:|"]
        for number, point in enumerate(self.points, start=1):
            name = f"**`{point.name}`**" if point is self.best else f"`{point.name}`"
            lines.append(f"| {number} | {name} | {' | '.join(_cells(point))} |")
        return "\n".join(lines)

    def _records(self) -> list[dict[str, Any]]:
        return [{"name": point.name, **asdict(point)} for point in self.points]

    def _log(self, best: Point, files: Sequence[Path]) -> None:
        from llm_assets.resources.mlflow import MlflowTracking

        client, experiment_id = MlflowTracking().client()
        tags: dict[str, Any] = {"rex.sweep": self.name, "rex.best": best.name}
        run_id = client.create_run(experiment_id, tags=tags, run_name=f"sweep {self.name}").info.run_id
        for file in files:
            client.log_artifact(run_id, str(file))
        client.log_metric(run_id, "bits_per_byte", best.bits_per_byte or 0.0)
        client.set_terminated(run_id)


def _cells(point: Point, widths: Sequence[int] = (0, 0, 0)) -> list[str]:
    texts = [
        "-" if point.bits_per_byte is None else f"{point.bits_per_byte:.4f}",
        "-" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}",
        "-" if point.quantized_bytes is None else f"{point.quantized_bytes / 1e6:.2f}",
    ]
    if point.failed:
        texts[0] = "failed"
    return [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
