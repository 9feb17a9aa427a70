"""Reads commands, paths and links out of the documentation and says what is wrong with them, without running anything.

`problems_of_command` knows the programs that the documentation uses; a program that it does not know is a problem, so
that new kinds of commands get a check here.
"""

import ast
import importlib
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
ROOMS = "configs|model|bento|bench|llm_assets|tests|deploy|docs|\\.ci|\\.github"
SEPARATORS = {"|", "||", "&&", ";", "&"}
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b|\.\.\.")
INLINE = ("make ", "python -m ", "dagster ", "bentoml ", "docker compose ", ".venv/bin/")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks, outside fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell block as words, those inside `$(...)` included."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            for inner in re.findall(r"\$\(([^()]*)\)", word):
                yield from commands(inner)
            if word in SEPARATORS:
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def documented_commands(page: Path) -> list[str]:
    """Every command of a page, of its blocks and of its text."""
    of_blocks = [shlex.join(words) for block in blocks(page, "sh") for words in commands(block)]
    of_text = [shlex.join(words) for span in inline_code(page) if span.startswith(INLINE) for words in commands(span)]
    return [*of_blocks, *of_text]


def problems_of_command(command: str) -> list[str]:
    """What is wrong with one simple command; empty if everything that it names exists."""
    words = shlex.split(command)
    words = words[: next((i for i, word in enumerate(words) if word in ("<", ">", ">>")), len(words))]
    found = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        found += _unknown_variable(words.pop(0).split("=")[0])
    while words and words[0] in ("time", "exec"):
        words.pop(0)
    if not words:
        return found
    check = CHECKS.get(Path(words[0]).name)
    if not check:
        return [*found, f"{words[0]}: no check knows this program"]
    return [*found, *check(words[1:])]


def problems_of_path(span: str) -> list[str]:
    """What is wrong with a file or folder that the text names."""
    named = span.rstrip("/")
    if not re.fullmatch(rf"({ROOMS})(/[\w.*{{}},-]+)*", named) or "/" not in span or PLACEHOLDER.search(named):
        return []
    return [] if any(True for name in _expand(named) for _ in REPO.glob(name)) else [f"{span}: does not exist"]


def problems_of_links(page: Path) -> list[str]:
    """Links to files or headings that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            found.append(f"{target}: does not exist")
        elif anchor and anchor not in _anchors(file):
            found.append(f"{target}: no such heading")
    return found


def module_file(name: str) -> Path | None:
    """The file that `python -m NAME` runs."""
    base = REPO / name.replace(".", "/")
    return next((file for file in (base.with_suffix(".py"), base / "__main__.py") if file.is_file()), None)


def _expand(pattern: str) -> list[str]:
    braces = re.search(r"\{([^}]*)\}", pattern)
    if not braces:
        return [pattern]
    return [pattern[: braces.start()] + one + pattern[braces.end() :] for one in braces[1].split(",")]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def _makefile() -> tuple[set[str], set[str]]:
    """Targets and variables."""
    text = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE))
    return targets, set(re.findall(r"^(?:export )?([A-Z_]+) *[?:]?=", text, re.MULTILINE)) | {"BENTO"}


def _make(words: list[str]) -> list[str]:
    targets, variables = _makefile()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    wanted = [word for word in words if "=" not in word]
    found = [f"make {target}: no such target" for target in wanted if target not in targets]
    found += [f"make {name}=: no such variable" for name in given if name not in variables]
    experiment = given.get("EXPERIMENT", "stdlib")
    if not PLACEHOLDER.fullmatch(experiment):
        found += _settings(experiment, *shlex.split(given.get("OVERRIDES", "")))
    return found


@cache
def _settings(experiment: str, *overrides: str) -> list[str]:
    """Compose the settings, of each point where it is a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from llm_assets.experiments.compose import compose
    from model.errors import PipelineError

    try:
        (points,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([*overrides]), None)
        for point in points:
            compose(experiment, point)
    except PipelineError as error:
        return [str(error)]
    return []


def _python(words: list[str]) -> list[str]:
    if words[:1] == ["-c"]:
        imported = [node for node in ast.walk(ast.parse(words[1])) if isinstance(node, ast.ImportFrom)]
        names = [(node.module or "", alias.name) for node in imported for alias in node.names]
        return [f"python -c: {m} has no {name}" for m, name in names if not hasattr(importlib.import_module(m), name)]
    if not words or words[0] != "-m":
        return [f"python {' '.join(words)}: expected python -m MODULE"]
    file = module_file(words[1])
    if not file:
        return [f"python -m {words[1]}: no such module"]
    package = file.parent if file.name == "__main__.py" else None
    sources = "".join(one.read_text() for one in (package.rglob("*.py") if package else [file]))
    options = {word.split("=")[0] for word in words[2:] if re.match(r"--[a-z]", word)} - {"--help"}
    found = [
        f"python -m {words[1]} {option}: no such option" for option in sorted(options) if f'"{option}"' not in sources
    ]
    if words[1] == "llm_assets.experiments":
        found += _settings(words[2], *words[3:]) if len(words) > 2 else []
    return found


def _dagster(words: list[str]) -> list[str]:
    import dagster as dg

    from llm_assets import definitions, evaluation, images

    locations = {"definitions": definitions, "evaluation": evaluation, "images": images}
    known = {f"llm_assets.{name}": location.build_defs() for name, location in locations.items()}
    option = dict(itertools.pairwise(words))
    if words[0] in ("dev", "instance") or words[:2] == ["job", "execute"] == words:
        return []
    defs = known.get(option.get("-m", ""))
    if words[:2] not in (["job", "execute"], ["asset", "materialize"]) or not defs:
        return [f"dagster {' '.join(words[:2])} -m {option.get('-m')}: no such command or code location"]
    found = []
    if job := option.get("-j"):
        found += [] if job in {one.name for one in defs.resolve_all_job_defs()} else [f"{job}: no such job"]
    if selected := option.get("--select"):
        graph = defs.resolve_asset_graph()
        try:
            found += [] if dg.AssetSelection.from_string(selected).resolve(graph) else [f"{selected}: selects nothing"]
        except dg.DagsterInvalidSubsetError:
            found.append(f"{selected}: no such asset")
    in_tags = re.findall(r'"dagster/partition": "(\w+)"', option.get("--tags", ""))
    experiments = [*in_tags, option.get("--partition", "")]
    return [*found, *(problem for name in experiments if name for problem in _settings(name))]


def _bentoml(words: list[str]) -> list[str]:
    if words[0] != "serve" or len(words) < 2:
        return [] if words[0] in ("list", "serve") else [f"bentoml {words[0]}: no check knows this command"]
    module, _, service = words[1].partition(":")
    if module.startswith("rex-") or PLACEHOLDER.search(words[1]) or words[1].startswith("$"):
        return []
    file = module_file(module)
    classes = (
        {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)}
        if file
        else set()
    )
    return [] if service in classes else [f"bentoml serve {words[1]}: no such service"]


def _docker(words: list[str]) -> list[str]:
    if words[0] != "compose":
        return [] if words[0] in ("run", "ps", "stop") else [f"docker {words[0]}: no check knows this command"]
    file = yaml.safe_load((REPO / "docker-compose.yml").read_text())
    profiles = {name for service in file["services"].values() for name in service.get("profiles", [])}
    plain = [word for word in words[1:] if not word.startswith("-")]
    found = []
    if "--profile" in words:
        name = words[words.index("--profile") + 1]
        plain.remove(name)
        found += [] if name in profiles else [f"docker compose --profile {name}: no such profile"]
    if not plain:
        return found
    verb, *names = plain
    if verb not in ("up", "down", "exec", "logs", "ps"):
        return [*found, f"docker compose {verb}: no check knows this command"]
    named = names[:1] if verb == "exec" else names
    return [
        *found,
        *(f"docker compose {verb} {name}: no such service" for name in named if name not in file["services"]),
    ]


def _curl(words: list[str]) -> list[str]:
    from bento.api import create_app

    app = create_app(model_name="any", request_timeout_s=1, max_body_bytes=1)
    paths = {getattr(route, "path", "") for route in app.routes} | set(app.openapi()["paths"])
    asked = [re.sub(r"https?://[^/]+", "", word) for word in words if word.startswith("http")]
    return [f"curl {path}: no such route" for path in asked if path not in paths]


def _pip(words: list[str]) -> list[str]:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for word in words for name in re.findall(r"^\.\[(\w+)\]$", word)]
    return [f"pip install .[{name}]: no such extra" for name in named if name not in extras]


def _pytest(words: list[str]) -> list[str]:
    paths = [word for word in words if word.startswith("tests")]
    return [f"pytest {path}: does not exist" for path in paths if not (REPO / path).exists()]


def _unknown_variable(name: str) -> list[str]:
    files = ("docker-compose.yml", ".env.example", "model/settings/serving.py")
    places = [*(REPO / file for file in files), *(REPO / "bento").glob("*.py")]
    option = name.removeprefix("REX_").lower()
    known = any(name in file.read_text() or f"    {option}:" in file.read_text() for file in places)
    return [] if known else [f"{name}: no service reads this variable"]


def _fine(words: list[str]) -> list[str]:
    return []


CHECKS: dict[str, Callable[[list[str]], list[str]]] = {
    ".": _fine,
    "bentoml": _bentoml,
    "cd": _fine,
    "curl": _curl,
    "dagster": _dagster,
    "docker": _docker,
    "llama-cli": _fine,
    "llama-completion": _fine,
    "make": _make,
    "ollama": _fine,
    "pip": _pip,
    "pre-commit": _fine,
    "pytest": _pytest,
    "python": _python,
    "sha256sum": _fine,
    "transformers": _fine,
    "unset": _fine,
    "vllm": _fine,
}
