"""Validates the YAML files of `configs/` before Hydra reads them: an error is one line with file, line and expectation.

Hydra's own errors have no line numbers, and most YAML errors in it end as tracebacks. `model/settings/` defines the
values of options.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from model.errors import PipelineError
from model.settings import GROUPS, options

MAX_BYTES = 1 << 20
MAX_NODES = 5_000
"""OmegaConf reads at most 10,000."""
MAX_NAME_CHARACTERS = 50
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
NAME_RULE = (
    f"expected at most {MAX_NAME_CHARACTERS} lowercase letters, digits and single '_' or '-' between them, "
    "a letter first"
)
HYDRA_WORDS = {"null", "true", "false", "inf", "nan", "none"}
"""Names that an override `experiment=...` would parse as another type."""
PACKAGE = "# @package _global_"
_PACKAGE = re.compile(r"\s*#\s*@package\b")
_CHOICE = re.compile(r"(?:override\s+)?/?(?P<group>\w+)")
_OVERRIDE = re.compile(r"override\s+/(?P<group>\w+)")
_ENTRY = "`- override /GROUP: FILE`, FILE a name of configs/GROUP"
_REINTERPRETED = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Integers that YAML reads in base 8 or 60."""


@dataclass
class ConfigFile:
    """One YAML file. lines: the line of each option that it sets, by `group.name`. choices: file names by group."""

    path: Path
    lines: dict[str, int] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)


def names_of_files(config_dir: Path) -> list[str]:
    """Names of the experiments in `config_dir`, sorted; does not read their files."""
    stems = sorted(path.stem for path in _visible_files(config_dir) if path.suffix == ".yaml")
    return [name for name in stems if name_mistake(name) is None]


def misnamed_files(config_dir: Path) -> Iterator[str]:
    """One line for each file of `config_dir`/experiment whose name keeps it from being an experiment."""
    for path in sorted(_visible_files(config_dir)):
        mistake = name_mistake(path.stem) if path.suffix == ".yaml" else "expected a name that ends in .yaml"
        if mistake:
            yield f"{shown(path)}: {mistake}"


def _visible_files(config_dir: Path) -> Iterator[Path]:
    """Editors and copying tools keep files of their own beside a file: `.#x.yaml`, `._x.yaml`."""
    return (path for path in (config_dir / "experiment").glob("*.y*ml") if not path.name.startswith("."))


def name_mistake(name: str) -> str | None:
    """Reason why `name` is not a valid experiment name, else None.

    The name is a Dagster partition key, a value on Hydra's command line and a part of paths, of MLflow's model names,
    of BentoML's tags and of image repositories, which allow the fewest characters.
    """
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_CHARACTERS:
        return f"{name!r} is not a valid experiment name: {NAME_RULE}"
    if name in HYDRA_WORDS:
        return f"{name!r} is not a valid experiment name: Hydra reads it as a value; expected another"
    return None


def read_files(config_dir: Path, experiment: str, overrides: Sequence[str]) -> list[ConfigFile]:
    """The files that compose `experiment`, each checked: config.yaml, the experiment, then one of each group.

    A missing file is left to Hydra, which lists the existing ones.
    Raises PipelineError, one line, for the first mistake.
    """
    root = read_file(config_dir / "config.yaml", group=None)
    chosen = read_file(config_dir / "experiment" / f"{experiment}.yaml", group=None, needs_package=True)
    choices = {**root.choices, **chosen.choices}
    for override in overrides:
        group, equals, value = override.lstrip("+").partition("=")
        if equals and group in GROUPS:
            choices[group] = value
    files = [config_dir / group / f"{choice}.yaml" for group, choice in choices.items() if group in GROUPS]
    return [root, chosen, *(read_file(path, group=path.parent.name) for path in files if path.exists())]


def read_file(path: Path, *, group: str | None, needs_package: bool = False) -> ConfigFile:
    """Check one file of group `group`, or of the whole tree (None). Raises PipelineError, one line.

    needs_package: the file must begin with the line that applies its options to the whole tree.
    """
    text = _text(path)
    found = ConfigFile(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _mistake(path, line, f"{error.problem or error.context}", _expected_instead(text, line)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _mistake(path, line, f"a control character (#x{error.character:02x})", "text") from None
    except RecursionError:
        raise _mistake(path, 1, "lists or options nested too deep", "`group:` and `option: value` below it") from None
    if node is None:
        if not text.strip() or group is None:
            raise _mistake(path, 1, "nothing", "options as `option: value`")
        return found  # only comments: a group with its defaults
    if not isinstance(node, yaml.MappingNode):
        at = node.start_mark.line + 1
        raise _mistake(path, at, f"{_described(node)} at the top", "options as `option: value`")
    _check_nodes(path, node)
    if needs_package and text.lstrip().split("\n")[0].split() != PACKAGE.split():
        raise _mistake(path, 1, f"no line {PACKAGE!r}", "it as the first line of an experiment's file")
    if group and (line := next((n for n, one in enumerate(text.splitlines(), 1) if _PACKAGE.match(one)), 0)):
        raise _mistake(path, line, f"a line '@package' in a file of the group {group}", "it in experiments alone")
    for key, value in node.value:
        if key.value == "defaults":
            if group:
                raise _mistake(path, key.start_mark.line + 1, f"'defaults' in a file of the group {group}", "options")
            if needs_package:
                _check_defaults(path, value)
            found.choices = dict(_choices(value))
        elif needs_package and key.value == "name":
            raise _mistake(path, key.start_mark.line + 1, "the option 'name'", "none: the name is that of the file")
        else:
            _note_lines(found, group, key, value)
            if group is None and key.value in GROUPS:
                _check_options(path, key.value, value)
    if group:
        _check_options(path, group, node)
    return found


def locate(message: str, files: Sequence[ConfigFile], overrides: Sequence[str]) -> str | None:
    """`file, line N` of the option that an error message names, if a file set it and no override did."""
    named = re.search(r"full_key: ([^\n]+)", message) or re.search(r"^([a-z]\w*\.\w+)[\w.-]*(?: is |: )", message)
    if named is None:
        return None
    option = ".".join(re.split(r"[.\[]", named[1])[:2])
    if any(override.lstrip("+~").partition("=")[0].startswith(option) for override in overrides):
        return None
    # Hydra's merge order: the experiment's options come last.
    for file in [*files[1:2], *files[2:], *files[:1]]:
        if option in file.lines:
            return f"{shown(file.path)}, line {file.lines[option]}"
    return None


def did_you_mean(message: str) -> str:
    """`; did you mean ...?` for an error message about an unknown option."""
    named = re.search(r"full_key: (\w+)\.(\w+)", message)
    if named is None or "not in" not in message or "Did you mean" in message or named[1] not in GROUPS:
        return ""
    close = difflib.get_close_matches(named[2], [item.name for item in options(GROUPS[named[1]])], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(path: Path) -> str:
    """The path relative to the folder above `configs/`, for messages."""
    text = str(Path(*path.parts[-2 if path.parent.name == "configs" else -3 :]))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text(path: Path) -> str:
    if path.is_dir():
        raise PipelineError(f"{shown(path)} is a folder: expected a YAML file of options")
    if path.exists() and not path.is_file():
        raise PipelineError(f"{shown(path)} is a device or a pipe: expected a YAML file of options")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PipelineError(
                f"{shown(path)} has {path.stat().st_size:,} bytes: expected options, at most {MAX_BYTES:,}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise PipelineError(
            f"{shown(path)} cannot be read ({error.strerror}): expected a YAML file of options"
        ) from None
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _mistake(path, 1, "a byte order mark", "UTF-8 without one: save the file as UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _mistake(
            path, line, f"the byte {data[error.start]:#04x}, not UTF-8", "UTF-8: save the file as UTF-8"
        ) from None
    if "\ufeff" in text:
        line = text.count("\n", 0, text.index("\ufeff")) + 1
        raise _mistake(path, line, "a byte order mark", "UTF-8 without one")
    return text


def _mistake(path: Path, line: int, found: str, expected: str) -> PipelineError:
    return PipelineError(f"{shown(path)}, line {line}: {' '.join(found.split())}: expected {expected}")


def _expected_instead(text: str, line: int) -> str:
    lines = text.splitlines()
    wrong = lines[line - 1] if line <= len(lines) else ""
    if "\t" in wrong:
        return "spaces instead of a tab"
    if re.search(r"[\[:,-]\s*[*&@`%!|>]", wrong):
        return "quotes around a text with a special character: '*.txt'"
    if wrong.startswith(("---", "...")):
        return "one document of options"
    return "`option: value` with balanced brackets and quotes, options of one group below each other"


def _check_nodes(path: Path, root: yaml.MappingNode) -> None:
    """Refuse keys given twice, keys that are not text, tags, and aliases that expand without bound."""
    count, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        line = node.start_mark.line + 1
        count += 1
        if count > MAX_NODES:
            raise _mistake(path, line, f"more than {MAX_NODES:,} values, aliases expanded", "fewer")
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise _mistake(path, line, f"the tag {node.tag}", "plain values without tags")
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            try:
                parse(node.value)
            except (GrammarParseError, RecursionError):
                raise _mistake(
                    path, line, f"{_shortened(node.value)}", "`${group.option}`, or '\\${' for these characters"
                ) from None
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                at = key.start_mark.line + 1
                if key.tag != "tag:yaml.org,2002:str":
                    raise _mistake(path, at, f"{_described(key)} in place of an option's name", "`option: value`")
                if key.value in seen:
                    raise _mistake(
                        path, at, f"{key.value!r} is given twice, first on line {seen[key.value]}", "it once"
                    )
                seen[key.value] = at
                waiting.append(value)


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the value {_shortened(node.value)}" if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 50 else f"{text[:50]}...")


def _check_defaults(path: Path, node: yaml.Node) -> None:
    """Check what an experiment chooses of each group; names of other experiments are left to Hydra."""
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.SequenceNode):
        raise _mistake(path, line, f"{_described(node)} as 'defaults'", f"a list of {_ENTRY}")
    seen: dict[str, int] = {}
    for entry in node.value:
        at = entry.start_mark.line + 1
        if isinstance(entry, yaml.ScalarNode) and entry.tag == "tag:yaml.org,2002:str":
            if entry.value.rpartition("/")[2] == path.stem:
                raise _mistake(path, at, "this experiment in its own defaults", _ENTRY)
            continue
        if not isinstance(entry, yaml.MappingNode) or len(entry.value) != 1:
            several = "several choices in one entry" if isinstance(entry, yaml.MappingNode) else _described(entry)
            raise _mistake(path, at, several, _ENTRY)
        key, value = entry.value[0]
        match = _OVERRIDE.fullmatch(key.value)
        if match is None or match["group"] not in GROUPS:
            raise _mistake(path, at, f"the entry {key.value!r}", f"{_ENTRY}, GROUP one of {', '.join(GROUPS)}")
        group = match["group"]
        if group in seen:
            raise _mistake(path, at, f"{key.value!r} is given twice, first on line {seen[group]}", "it once")
        seen[group] = at
        files = sorted(file.stem for file in (path.parents[1] / group).glob("*.yaml"))
        if not isinstance(value, yaml.ScalarNode) or value.value.removesuffix(".yaml") not in files:
            raise _mistake(path, at, f"{_described(value)} for {key.value!r}", f"one of {', '.join(files)}")


def _check_options(path: Path, group: str, node: yaml.Node) -> None:
    """Refuse values whose kind an option does not take, and those that YAML would read as another text or number."""
    if not isinstance(node, yaml.MappingNode):
        raise _mistake(
            path, node.start_mark.line + 1, f"{_described(node)} for {group!r}", "options as `option: value` below it"
        )
    kinds = {item.name: str(item.type) for item in options(GROUPS[group])}
    for key, value in node.value:
        kind = kinds.get(key.value, "")
        expected = "a mapping" if kind.startswith("dict") else "a list" if kind.startswith("list") else ""
        found = _described(value)
        if expected and found != expected and value.tag != "tag:yaml.org,2002:null" and "${" not in str(value.value):
            raise _mistake(path, value.start_mark.line + 1, f"{found} for {group}.{key.value}", expected)
        takes_text = "str" in kind or "Literal" in kind
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(scalar, yaml.ScalarNode):
                _check_scalar(path, f"{group}.{key.value}", scalar, takes_text=takes_text and "bool" not in kind)
        if kind == str(bool) and value.tag.rpartition(":")[2] in ("int", "float"):
            raise _mistake(path, value.start_mark.line + 1, f"{found} for {group}.{key.value}", "true or false")


def _check_scalar(path: Path, option: str, node: yaml.ScalarNode, *, takes_text: bool) -> None:
    tag, line = node.tag.rpartition(":")[2], node.start_mark.line + 1
    try:
        read = yaml.SafeLoader("").construct_object(node) if tag in ("bool", "int", "float") else node.value
    except ValueError:
        raise _mistake(path, line, f"{_described(node)} for {option}", f"a value of the type {tag}") from None
    if takes_text and str(read) != node.value:
        raise _mistake(path, line, f"{option} is {node.value}, which YAML reads as {read}", f"quotes: '{node.value}'")
    if tag == "int" and _REINTERPRETED.fullmatch(node.value):
        raise _mistake(path, line, f"{option} is {node.value}, which YAML reads as {read}", "digits alone")


def _choices(node: yaml.Node) -> Iterator[tuple[str, str]]:
    """Group and file of each entry of a defaults list; invalid entries are left to Hydra."""
    for entry in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.MappingNode):
            for key, value in entry.value:
                match = _CHOICE.fullmatch(key.value)
                if match and isinstance(value, yaml.ScalarNode):
                    yield match["group"], value.value


def _note_lines(found: ConfigFile, group: str | None, key: yaml.Node, value: yaml.Node) -> None:
    name = key.value if group is None else f"{group}.{key.value}"
    found.lines[name] = key.start_mark.line + 1
    if group is None and isinstance(value, yaml.MappingNode):
        for inner, _ in value.value:
            found.lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
