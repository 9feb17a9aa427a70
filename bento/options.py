"""Options of the service: arguments fixed when a Bento is built; environment variables override them at start.

`bentoml serve` ignores `--arg` for a built Bento, so a deployed service needs the variables.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import bentoml
from bentoml.exceptions import BentoMLException, InvalidArgument, NotFound
from pydantic import ConfigDict, Field, ValidationError, create_model

from bento.bentoml_internals import model_store
from model.settings import Option, ServingSettings, options
from model.settings.option import option

PREFIX = "REX_"
MAX_VALUE_LENGTH = 200
"""Characters of a value in a message."""
LIKENESS = 0.88
"""Of the name of a variable and that of an option, for one to be a misspelling of the other."""


@dataclass
class ServiceSettings(ServingSettings):
    """All options of a service: those of the pipeline (`model/settings/serving.py`) and those of a deployment."""

    # The pipeline packages a quantized model; a directory given by hand may hold either precision.
    quantized: bool | Literal["auto"] = option(  # type: ignore[assignment]
        "auto", "true: int8 weights; false: full precision; auto: as stored in the model's directory."
    )
    vllm_python: str = option(
        "", "Interpreter of the environment that has vLLM, which `make vllm` makes; for the engine vllm."
    )
    model: str = option("", "Tag in the BentoML model store, or directory of a checkpoint or quantized model.")
    draft: str = option(
        "",
        "Smaller model with the same tokenizer, as tag or directory, that proposes tokens where that pays; "
        "texts stay the same. Only with the step native; empty: none.",
    )
    served_model_name: str = option(
        "", "Names of the model for clients, comma separated; answers have the first. Empty: its tag."
    )
    champion: str = option(
        "",
        "Registered model (rex-stdlib) of the MLflow server at MLFLOW_TRACKING_URI; its champion is served, whenever "
        "it changes.",
    )
    champion_poll_s: float = option(
        10.0, "Interval at which MLflow is polled for the champion.", unit="seconds", above=0, maximum=86_400
    )
    shadow_share: float = option(
        0.0,
        "Share of the requests that are copied to the version with the alias challenger of REX_CHAMPION, whose answers "
        "are dropped; /metrics compares both. 0: none.",
        minimum=0,
        maximum=1,
    )
    shadow_window_s: float = option(
        300.0, "Time over which champion and challenger are compared.", unit="seconds", above=0, maximum=86_400
    )
    rollback_window_s: float = option(
        0.0,
        "How long after a new champion took over the former one is restored if a bound is exceeded. 0: never.",
        unit="seconds",
        minimum=0,
        maximum=86_400,
    )
    rollback_max_error_rate: float = option(
        0.02, "Largest fraction of the new champion's generations that may fail.", minimum=0, maximum=1
    )
    rollback_max_slowdown: float = option(
        1.5, "Largest median time per token, as a multiple of the former champion's.", above=0, maximum=1000
    )
    rollback_min_generations: int = option(
        50,
        "Minimum number of generations of each model for a comparison.",
        unit="generations",
        above=0,
        maximum=1_000_000,
    )
    compare_with: str = option(
        "",
        "Address of a second service, http://HOST:PORT: the page offers its answers side by side with this one's. Its "
        "REX_CORS_ORIGINS has to name this service's address.",
    )
    clamp_max_tokens: bool = option(
        True, "Reduce max_tokens to what fits into the context; false: refuse a larger value with a 400."
    )
    receive_timeout_s: float = option(
        30.0,
        "Time limit from a connection, or a request's first byte, to its last byte; then 408.",
        unit="seconds",
        above=0,
        maximum=86_400,
    )
    keep_alive_s: float = option(
        75.0, "How long an idle connection stays open for another request.", unit="seconds", above=0, maximum=86_400
    )
    max_connections: int = option(
        4096,
        "Maximum number of open connections; a new one beyond that closes the connection that has been idle longest.",
        unit="connections",
        above=0,
        maximum=1_000_000,
    )
    threads: int = option(
        0,
        "CPU threads of the model; 0: chosen by its size, the CPU quota and the affinity.",
        unit="threads",
        minimum=0,
        maximum=4096,
    )


def _pydantic_field(item: Option) -> tuple[Any, Any]:
    limits: dict[str, Any] = {}
    if item.bounds:
        limits = {
            "gt": item.bounds.above,
            "ge": item.bounds.minimum,
            "lt": item.bounds.below,
            "le": item.bounds.maximum,
        }
    if item.type is float:
        limits["allow_inf_nan"] = False
    return item.type, Field(item.default, description=item.text, **limits)


_FIELDS: dict[str, Any] = {item.name: _pydantic_field(item) for item in options(ServiceSettings)}
_Arguments: Any = create_model("_Arguments", __config__=ConfigDict(extra="forbid"), **_FIELDS)


class BentoArgs(_Arguments):
    """`ServiceSettings` in BentoML's form: `--arg NAME=VALUE` of `bentoml build` and of `bentoml serve`."""


RENAMED = {f"{PREFIX}MIXED_PRECISION": f"{PREFIX}PRECISION=bfloat16 (or float32)"}
"""Former variables, and what to set instead: to ignore one would change what a service computes in silence."""


def with_overrides(arguments: BentoArgs, environment: Mapping[str, str] | None = None) -> BentoArgs:
    """The arguments, overridden by the variables REX_MODEL, REX_DEVICE, ... that are set.

    Raises bentoml's InvalidArgument, one line that names the variable.
    """
    environment = os.environ if environment is None else environment
    for former, name in RENAMED.items():
        if environment.get(former):
            raise InvalidArgument(f"{former} is set, which has no effect any more: set {name} in its place")
    names = [PREFIX + name.upper() for name in BentoArgs.model_fields]
    for name in sorted(environment):
        # Other variables may begin so, too: only what looks like a slip is refused.
        if name.startswith(PREFIX) and name not in names and (meant := get_close_matches(name, names, 1, LIKENESS)):
            raise InvalidArgument(f"{name} is set, which is not an option: did you mean {meant[0]}?")
    given = {
        name: environment[PREFIX + name.upper()]
        for name in BentoArgs.model_fields
        if environment.get(PREFIX + name.upper())
    }
    try:
        return BentoArgs.model_validate({**arguments.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        found = str(given.get(name))
        shown = repr(found if len(found) <= MAX_VALUE_LENGTH else f"{found[:MAX_VALUE_LENGTH]}...")
        raise InvalidArgument(f"{PREFIX}{name.upper()} is {shown}: {first['msg']}") from None


def refuse_without_champion(options: BentoArgs) -> None:
    """Raises InvalidArgument for an option that needs a registered model, without one."""
    for name in ("shadow_share", "rollback_window_s"):
        if getattr(options, name) and not options.champion:
            raise InvalidArgument(
                f"{PREFIX}{name.upper()} is {getattr(options, name):g}, but there is no {PREFIX}CHAMPION: set the "
                "registered model whose versions are compared"
            )


def refuse_for_vllm(options: BentoArgs) -> None:
    """Raises InvalidArgument for an option that the engine vllm has no equivalent of."""
    if options.engine != "vllm":
        return
    for name, only in (("kv_cache", True), ("step", "auto"), ("draft", "")):
        if getattr(options, name) != only:
            raise InvalidArgument(
                f"{PREFIX}{name.upper()} is {getattr(options, name)!r}, and {PREFIX}ENGINE is vllm, which has only "
                f"{only!r}"
            )


def origins(cors_origins: str) -> tuple[str, ...]:
    """The allowed origins. Raises InvalidArgument for a malformed origin, which no browser would match."""
    found = tuple(origin.strip() for origin in cors_origins.split(",") if origin.strip())
    for origin in found:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise InvalidArgument(
                f"{PREFIX}CORS_ORIGINS has {origin!r}: expected * or scheme and host, https://example.org"
            )
    return found


def second_service(address: str) -> str:
    """The address of the service that the page compares with. Raises InvalidArgument for a malformed one."""
    # Semicolons, commas and quotes would end the address inside the page's Content-Security-Policy.
    if address and not re.fullmatch(r"https?://[^/\s;,'\"]+(/[^\s;,'\"?#]*)?", address):
        raise InvalidArgument(
            f"{PREFIX}COMPARE_WITH is {address!r}: expected scheme and host of a service, https://example.org"
        )
    return address


def is_path(model: str) -> bool:
    """Whether `model` names a directory, not a tag: tags have no slash."""
    return "/" in model or os.sep in model or Path(model).is_dir()


def find_model(model: str) -> Path:
    """The directory of a tag or a path. Raises BentoMLException, one line with the remedy."""
    if not model:
        raise InvalidArgument(
            "no model is given: set REX_MODEL, or pass --arg model=..., to a tag of the BentoML model store or a "
            "directory"
        )
    if is_path(model):
        directory = Path(model).expanduser()
        if not (directory / "config.json").is_file():
            raise InvalidArgument(
                f"model {model!r}: there is no {str(directory.absolute() / 'config.json')!r}; give the directory of a "
                "model, as an absolute path"
            )
        return directory.absolute()
    try:
        return Path(bentoml.models.get(model).path)
    except (NotFound, ValueError) as error:
        raise InvalidArgument(
            f"model {model!r} is not in the BentoML model store ({model_store()}): `bentoml models list` shows what "
            "is; make it with the pipeline or import it with `bentoml models import`"
        ) from error
    except BentoMLException as error:
        raise InvalidArgument(f"model {model!r}: {' '.join(str(error).split())}") from error


def variables() -> list[Option]:
    """The options as environment variables REX_MODEL, REX_CHAMPION, ...; deployment options first."""
    pipelines = {item.name for item in options(ServingSettings)}
    found = [replace(item, group="", name=PREFIX + item.name.upper()) for item in options(ServiceSettings)]
    return sorted(found, key=lambda item: item.name.removeprefix(PREFIX).lower() in pipelines)


def describe_variables() -> str:
    """One line of Markdown for each option: variable, default, meaning."""
    return "\n".join(f"- `{item.name}` (default `{item.default_text}`): {item.text}" for item in variables())
