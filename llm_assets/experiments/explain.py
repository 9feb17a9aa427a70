"""Help on the options: resolved settings with comments, a list for `--help`, tables for the documentation.

Generated from the fields of `model/settings/`.
"""

import json
import textwrap
from collections.abc import Iterable
from typing import Any

import yaml

from model.settings import GROUPS, ExperimentSettings, Option, options

WIDTH = 120


def as_yaml(settings: ExperimentSettings) -> str:
    """The resolved settings as YAML, each option below a comment with its meaning, range and default."""
    lines = [_entry("name", settings.name), _entry("description", settings.description)]
    for group, kind in GROUPS.items():
        lines += ["", *_comment((kind.__doc__ or "").split("\n")[0], ""), f"{group}:"]
        for item in options(kind):
            lines += _comment(_sentence(item), "  ")
            lines.append("  " + _entry(item.name, getattr(getattr(settings, group), item.name)))
    return "\n".join(lines) + "\n"


def as_list() -> str:
    """One paragraph for each option of an experiment, for `--help`."""
    paragraphs = []
    for kind in GROUPS.values():
        for item in options(kind):
            text = textwrap.fill(_sentence(item), WIDTH, initial_indent="    ", subsequent_indent="    ")
            paragraphs.append(f"  {item.full_name}\n{text}")
    return "\n".join(paragraphs)


def as_table(items: Iterable[Option]) -> str:
    """A Markdown table: option, meaning, values, default."""
    rows = [
        f"| `{item.name}` | {_cell(item.text)} | {_cell(item.allowed)} | {_cell(item.default_text)} |" for item in items
    ]
    return "\n".join(["| option | what it does | values | default |", "|---|---|---|---|", *rows])


def as_markdown() -> str:
    """The options of every group as Markdown lists: the Launchpad's help."""
    parts = []
    for kind in GROUPS.values():
        parts += ["", f"**{kind.group}**", ""]
        parts += [f"- `{item.full_name}`: {_sentence(item)}" for item in options(kind)]
    return "\n".join(parts)


def _sentence(item: Option) -> str:
    allowed = f" Values: {item.allowed}." if item.allowed else ""
    return f"{item.text}{allowed} Default: {item.default_text}."


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _entry(name: str, value: Any) -> str:
    dumped = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    )
    # JSON is valid YAML, and escapes line breaks.
    return f"{name}: {json.dumps(value, ensure_ascii=False) if chr(10) in dumped else dumped}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
