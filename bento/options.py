"""What the service is told: arguments fixed when a Bento is built, each overridden at start by a variable.

`bentoml serve` ignores `--arg` for a built Bento, hence the variables.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import bentoml
from bentoml.exceptions import BentoMLException, InvalidArgument, NotFound
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bento.bentoml_internals import model_store

PREFIX = "REX_"
M = TypeVar("M", bound=BaseModel)


class BentoArgs(BaseModel):
    """Given by `--arg NAME=VALUE` to `bentoml build`, or to `bentoml serve` of the source."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("", description="Tag in the BentoML model store, or the directory of a REX model.")
    served_model_name: str = Field(
        "", description="Names of the model for clients, comma separated; answers bear the first. Default: its tag."
    )
    champion: str = Field(
        "",
        description="Registered model of the MLflow server at MLFLOW_TRACKING_URI whose champion is served, whenever it "
        "changes.",
    )
    champion_poll_s: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="From one question for the champion to the next."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one.")
    kv_cache: bool = Field(True, description="false computes earlier tokens again for each new one, for comparison.")
    quantized: bool | Literal["auto"] = Field(
        "auto", description="true serves int8 weights, false full precision, auto what the model directory holds."
    )
    mixed_precision: bool = Field(
        False, description="true holds weights that are not int8, and activations, in bfloat16."
    )
    step: Literal["auto", "reference", "native"] = Field(
        "auto", description="What computes a step of the engine; auto takes the fastest that runs the model here."
    )
    max_batch_size: int = Field(16, ge=1, description="Requests that generate at once.")
    kv_cache_mib: int = Field(
        0,
        ge=0,
        description="Most MiB for keys and values; fewer requests then generate at once. 0 takes what max_batch_size needs.",
    )
    prefill_chunk: int = Field(
        256,
        ge=1,
        description="Tokens of one step with prompts in it, so that a long prompt does not hold up running texts.",
    )
    max_queue: int = Field(128, ge=1, description="Requests that wait; more are answered 429.")
    max_queue_tokens: int = Field(262_144, ge=1, description="Prompt tokens that wait; more are answered 429.")
    queue_timeout_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="From arrival to the start; later is answered 503."
    )
    request_timeout_s: float = Field(300.0, gt=0, allow_inf_nan=False, description="From arrival to the last token.")
    step_timeout_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Of one step of the model; a longer one hangs and is ended."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="That running requests have to finish after SIGTERM."
    )
    clamp_max_tokens: bool = Field(
        True, description="true generates as many tokens as fit where more are asked for; false refuses with a 400."
    )
    receive_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="From a connection or a request's first byte to its last; then 408.",
    )
    keep_alive_s: float = Field(
        75.0, gt=0, allow_inf_nan=False, description="That an idle connection stays open for the next request."
    )
    max_connections: int = Field(
        4096, ge=1, description="Open connections; beyond it the one that is idle longest is closed for a new one."
    )
    max_body_bytes: int = Field(1_048_576, ge=1, description="Of a request's body; more is answered 413.")
    cors_origins: str = Field(
        "", description="Web sites whose pages may call the service, comma separated; * for all. None by default."
    )
    allow_anonymous: bool = Field(
        False, description="true lets anybody in who reaches the service, where no API key is set."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of the model; 0 takes one for a small model, else every usable core."
    )


def with_overrides(arguments: BentoArgs, environment: Mapping[str, str] | None = None) -> BentoArgs:
    """The arguments with REX_MODEL, REX_DEVICE, ... in their place where set.

    Raises bentoml's InvalidArgument, one line that names the variable.
    """
    environment = os.environ if environment is None else environment
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
        raise InvalidArgument(f"{PREFIX}{name.upper()} is {given.get(name)!r}: {first['msg']}") from None


def origins(cors_origins: str) -> tuple[str, ...]:
    """The web sites of the option. Raises InvalidArgument for what is no origin: a browser would never match it."""
    found = tuple(origin.strip() for origin in cors_origins.split(",") if origin.strip())
    for origin in found:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise InvalidArgument(
                f"{PREFIX}CORS_ORIGINS has {origin!r}: expected * or scheme and host, https://example.org"
            )
    return found


def is_path(model: str) -> bool:
    """Whether `model` names a directory, not a tag: tags have no slash."""
    return "/" in model or os.sep in model or Path(model).is_dir()


def find_model(model: str) -> Path:
    """The directory of a tag or a path. Raises BentoMLException, one line that says what to do."""
    if not model:
        raise InvalidArgument(
            "no model is given: set REX_MODEL, or pass --arg model=..., to a tag of the BentoML model store or a directory"
        )
    if is_path(model):
        directory = Path(model).expanduser()
        if not (directory / "config.json").is_file():
            raise InvalidArgument(
                f"model {model!r}: there is no {directory.absolute() / 'config.json'}; give the directory of a model, as an "
                "absolute path"
            )
        return directory.absolute()
    try:
        return Path(bentoml.models.get(model).path)
    except (NotFound, ValueError) as error:
        raise InvalidArgument(
            f"model {model!r} is not in the BentoML model store ({model_store()}): `bentoml models list` shows what is; make it "
            "with the pipeline or import it with `bentoml models import`"
        ) from error
    except BentoMLException as error:
        raise InvalidArgument(f"model {model!r}: {' '.join(str(error).split())}") from error


def describe_variables() -> str:
    """One line of Markdown for each option: variable, default, meaning."""
    lines = []
    for name, field in BentoArgs.model_fields.items():
        default: Any = field.default if field.default != "" else "none"
        lines.append(f"- `{PREFIX}{name.upper()}` (default `{str(default).lower()}`): {field.description}")
    return "\n".join(lines)
