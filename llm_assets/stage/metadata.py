"""Builds the UI metadata of an artifact: numbers that the UI plots, tables, pictures, text samples.

Pure functions from summaries and files to `dg.MetadataValue`s; measuring happens elsewhere.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg

from llm_assets.versions.measurements import in_words

# An event is a row of the run storage, and the UI loads pages of them, so pictures must be small.
PICTURE_BYTES = 300_000
TEXT_CHARACTERS = 20_000
INLINE_CHARACTERS = 1000
"""Longest Markdown that the UI shows inline; it puts longer text behind a link."""
PICTURE_WIDTH = 280
"""Pixels that the Overview has room for beside the longest name of an entry, on a screen 1,440 pixels wide."""
SIGNIFICANT_DIGITS = 5
_UNQUOTED = "/:=',;+!*@$&-._~"


NAME_CHARACTERS = 34
"""Longest name of an entry that the UI shows whole; it prints a longer one over the value."""
ROW_CHARACTERS = 65
"""Characters that the Overview has room for on a screen 1,440 pixels wide: the longest name of an asset's entries, and
both columns of a summary. It cuts longer rows."""
SAMPLE_CHARACTERS = 42
"""Longest line of a sample that the Overview has room for on that screen; the UI does not wrap the lines of a block."""


def numbers(summary: Any, prefix: str = "") -> dict[str, int | float]:
    """The finite numbers of a dataclass or a mapping, rounded, nested keys joined by `/`."""
    fields = summary if isinstance(summary, Mapping) else dataclasses.asdict(summary)
    found: dict[str, int | float] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = rounded(value)
    return found


def rounded(value: float) -> int | float:
    """A float rounded to five significant digits, an integer from 100,000 on; other values unchanged."""
    if isinstance(value, int) or not math.isfinite(value) or value == 0:
        return value
    digits = SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(abs(value)))
    return round(value, digits) if digits > 0 else int(round(value, digits))


def summary(**quantities: str) -> dg.MarkdownMetadataValue:
    """A short table of rounded numbers with units, shown inline. Underscores of identifiers become spaces.

    The longest name and the longest value have to fit into ROW_CHARACTERS.
    """
    named = {name.replace("_", " ") if name.isidentifier() else name: value for name, value in quantities.items()}
    rows = [f"| {name} | {value} |" for name, value in named.items()]
    return dg.MetadataValue.md("\n".join(["| | |", "|---|---:|", *rows]))


def decision(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Why a model is champion or not, with the numbers (`decision_of`)."""
    shown: dict[str, Any] = {}
    if "decision" in recorded:
        shown["champion_decision"] = recorded["decision"]
    found: dict[str, str] = {}
    if "difference" in recorded:
        found |= {
            "bits per byte": f"{recorded['candidate']:.4f}",
            "champion's": f"{recorded['champion_bits_per_byte']:.4f}, version {recorded['champion']}",
            "difference": f"{recorded['difference']:+.4f}",
            f"{recorded['confidence']:.0%} interval": f"{recorded['low']:+.4f} to {recorded['high']:+.4f}",
            "text": f"{recorded['pieces']} {recorded['unit']}, {size(recorded['bytes'])}",
        }
        shown["bits_per_byte_to_champion"] = rounded(recorded["difference"])
    if "parity" in recorded:
        words = in_words(recorded)
        shown["champion_evidence"] = summary(**found, tasks=words["tasks"], export=words["parity"])
    elif found:
        shown["champion_evidence"] = summary(**found)  # of an older release
    if isinstance(recorded.get("tasks"), list):
        shown["champion_tasks"] = table(recorded["tasks"])
    return shown


def size(count: float) -> str:
    """A human-readable size: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 99.5 else f"{count:.2g} {unit}"


def bars(title: str, values: Mapping[str, float], unit: str) -> dg.MarkdownMetadataValue:
    """A bar chart of up to four values, small enough that the UI shows it inline.

    unit: `bytes`, or what follows a number.
    """
    top = max([*values.values(), 1e-12])
    parts = []
    for number, (name, value) in enumerate(list(values.items())[:4]):
        y, width = 20 * number, round(85 * value / top)
        parts.append(f"<text x='0' y='{y + 13}'>{_escaped(name)}</text>")
        parts.append(f"<rect x='105' y='{y + 3}' width='{width}' height='12' fill='#48c'/>")
        label = size(value) if unit == "bytes" else f"{_short(value)}{unit}"
        parts.append(f"<text x='{110 + width}' y='{y + 13}'>{label}</text>")
    return _svg(title, "".join(parts), PICTURE_WIDTH, 20 * min(len(values), 4))


def line(title: str, points: Sequence[tuple[float, float]]) -> dg.MarkdownMetadataValue:
    """A curve of (step, y) with its ends labeled, small enough that the UI shows it inline."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) < 2:
        return dg.MetadataValue.md(f"{title}: {len(finite)} points, too few for a curve")
    kept = [finite[i * (len(finite) - 1) // 31] for i in range(32)] if len(finite) > 32 else finite
    (left, right), low, high = (kept[0][0], kept[-1][0]), min(y for _, y in kept), max(y for _, y in kept)
    path = " ".join(
        f"{round(240 * (x - left) / ((right - left) or 1))},{round(5 + 70 * (high - y) / ((high - low) or 1))}"
        for x, y in kept
    )
    ends = f"<text x='0' y='92'>step {_short(left)}: {_short(kept[0][1])}</text>"
    ends += f"<text x='240' y='92' text-anchor='end'>step {_short(right)}: {_short(kept[-1][1])}</text>"
    return _svg(title, f"<polyline points='{path}' fill='none' stroke='#48c'/>{ends}", 240, 96)


def curve(path: Path, name: str) -> list[tuple[float, float]]:
    """The values of one name by step, from a training's `curves.json`."""
    return [(entry["step"], entry[name]) for entry in json.loads(path.read_text()) if name in entry]


def _svg(title: str, content: str, width: int, height: int) -> dg.MarkdownMetadataValue:
    image = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-size='11'>{content}</svg>"
    text = f"![{title}](data:image/svg+xml,{quote(image, safe=_UNQUOTED)})"
    if len(text) > INLINE_CHARACTERS:
        encoded = base64.b64encode(image.encode()).decode()
        text = f"![{title}](data:image/svg+xml;base64,{encoded})"
    return dg.MetadataValue.md(text)


def _short(value: float) -> str:
    """Three digits, with k, M or G for thousands, millions and billions."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _escaped(text: str) -> str:
    return text.replace("&", "+").replace("<", "(").replace(">", ")")


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows as a table, numbers rounded; a column's type is that of its first value."""
    kinds = {bool: "bool", int: "int", float: "float"}
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(name, kinds.get(type(value), "string")) for name, value in (rows[0] if rows else {}).items()
        ]
    )
    records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in rows]
    return dg.MetadataValue.table(records, schema)


def _cell(value: Any) -> bool | int | float | str:
    if isinstance(value, float):
        return rounded(value)
    return value if isinstance(value, bool | int | str) else str(value)


def picture(path: Path) -> dg.MarkdownMetadataValue:
    """A PNG inside the event itself, so that the UI shows it wherever the artifact is stored.

    A picture that is too large for an event is scaled down.
    """
    content = path.read_bytes()
    if len(content) > PICTURE_BYTES:
        content = _smaller(path)
    return dg.MetadataValue.md(f"![{path.stem}](data:image/png;base64,{base64.b64encode(content).decode()})")


def _smaller(path: Path) -> bytes:
    from io import BytesIO

    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("P", palette=Image.Palette.ADAPTIVE)
    while True:
        buffer = BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= PICTURE_BYTES or min(image.size) <= 64:
            return buffer.getvalue()
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))


def fenced(text: str, language: str = "") -> str:
    """Text as a Markdown code block, whatever it contains, cut to a length that an event can carry."""
    cut = text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "\n..."
    fence = "```"
    while fence in cut:
        fence += "`"
    return f"{fence}{language}\n{cut.rstrip()}\n{fence}"


def wrapped(text: str) -> str:
    """Text whose lines fit into an asset's page, longer ones continued on the next line."""
    return "\n".join(
        line[start : start + SAMPLE_CHARACTERS]
        for line in text.split("\n")
        for start in range(0, len(line) or 1, SAMPLE_CHARACTERS)
    )


def text(path: Path, *, wrap: bool = False) -> dg.MarkdownMetadataValue:
    """A Markdown file, cut to the size of an event; the end is kept, since it has the newest entries.

    wrap: continue long lines on the next one, as a page does not do in blocks; breaks tables.
    """
    content = path.read_text(encoding="utf-8")
    return dg.MetadataValue.md((wrapped(content) if wrap else content)[-TEXT_CHARACTERS:] or "none")


def quoted(text: str) -> str:
    """Text in quotes, control characters escaped, so that a cell of whitespace does not look empty."""
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'


def samples(texts: Mapping[str, str]) -> dg.MarkdownMetadataValue:
    """Samples of the model: each prompt with its continuation as a block."""
    return dg.MetadataValue.md("\n\n".join(fenced(wrapped(prompt + text)) for prompt, text in texts.items()) or "none")
