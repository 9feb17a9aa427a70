"""What a person sees of an artifact in the UI: numbers that plot, tables, pictures, text samples.

Functions of summaries and files that give `dg.MetadataValue`s; nothing is measured here.
"""

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

# An event is a row of the run storage, and the UI loads a page of them: pictures stay small.
PICTURE_BYTES = 300_000
TEXT_CHARACTERS = 20_000


def numbers(summary: Any, prefix: str = "") -> dict[str, int | float]:
    """The finite numbers of a dataclass or a mapping, nested keys joined by `/`."""
    fields = summary if isinstance(summary, Mapping) else dataclasses.asdict(summary)
    found: dict[str, int | float] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = value
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows as a table; a column's type is that of its first value."""
    kinds = {bool: "bool", int: "int", float: "float"}
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(name, kinds.get(type(value), "string")) for name, value in (rows[0] if rows else {}).items()
        ]
    )
    plain = [
        {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in row.items()}
        for row in rows
    ]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in plain], schema)


def picture(path: Path) -> dg.MarkdownMetadataValue:
    """A PNG inside the event itself, so that it shows in the UI wherever the artifact lies.

    One that is too large for an event is shown at a smaller scale.
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


def text(path: Path) -> dg.MarkdownMetadataValue:
    """A Markdown file, cut to a length that an event can carry; its end is kept, where the newest stands."""
    return dg.MetadataValue.md(path.read_text(encoding="utf-8")[-TEXT_CHARACTERS:] or "none")


def samples(texts: Mapping[str, str]) -> dg.MarkdownMetadataValue:
    """What the model wrote, each prompt with its continuation as a block."""
    return dg.MetadataValue.md("\n\n".join(fenced(prompt + text) for prompt, text in texts.items()) or "none")
