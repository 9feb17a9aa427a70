"""Composes an experiment's settings from `configs/` with Hydra.

    python -m llm_assets.experiments NAME [overrides]               prints the resolved settings as YAML
    python -m llm_assets.experiments NAME [overrides] --explain     the same, with an explanation of each option
    python -m llm_assets.experiments --list                         prints the experiments

NAME is a file of `configs/experiment/`; an override is Hydra's `group.option=value` or `group=file`. Composing reads
only the files, the overrides and the environment variables that the files name, so that every step of a run resolves
the same settings.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_assets.experiments import explain
from llm_assets.experiments.files import (
    did_you_mean,
    locate,
    misnamed_files,
    name_mistake,
    names_of_files,
    read_files,
    shown,
)
from llm_assets.experiments.references import refuse_own_checkpoint
from llm_assets.paths import REPOSITORY
from model.errors import PipelineError, ends_in_one_line
from model.settings import ExperimentSettings

CONFIG_DIR = Path(os.environ.get("LLM_ASSETS_CONFIG_DIR") or REPOSITORY / "configs")
DEFAULT_EXPERIMENT = "stdlib"
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException)
"""Exceptions of Hydra for errors in a configuration or an override; `one_line` formats them."""

ConfigStore.instance().store(name="settings", node=ExperimentSettings)


def experiment_names(config_dir: Path = CONFIG_DIR) -> list[str]:
    """Names of the experiments in `config_dir`, sorted."""
    return names_of_files(config_dir)


def compose(name: str, overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR) -> ExperimentSettings:
    """Resolve experiment `name` with Hydra overrides applied.

    Raises PipelineError, one line, for an unknown experiment or option, an error in one of its files, a value of the
    wrong type and a value out of range.
    """
    names = experiment_names(config_dir)
    if name not in names:
        mistake = name_mistake(name)
        if mistake and (config_dir / "experiment" / f"{name}.yaml").exists():
            raise PipelineError(f"{config_dir / 'experiment' / name}.yaml: {mistake}")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PipelineError(f"no experiment {name!r} in {config_dir / 'experiment'}: expected one of {names}{hint}")
    for override in overrides:
        if override.lstrip("+").partition("=")[0] in ("experiment", "name"):
            raise PipelineError(
                f"the override {override!r} would give {name!r} another's settings: run that experiment"
            )
    files = read_files(config_dir, name, overrides)
    try:
        with initialize_config_dir(str(config_dir.resolve())):
            composed = hydra_compose("config", [f"experiment={name}", *overrides, f"++name={name}"])
        # Hydra's `+group.option=` admits keys that no setting has: merging once more refuses them.
        typed = OmegaConf.merge(OmegaConf.structured(ExperimentSettings), OmegaConf.to_container(composed))
        settings = OmegaConf.to_object(typed)
    except (*COMPOSING_ERRORS, PipelineError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        message = str(error) if isinstance(error, PipelineError) else one_line(error)
        where = locate(str(error), files, overrides) or f"experiment {name!r} with {list(overrides)}"
        raise PipelineError(f"{where}: {message}") from error
    assert isinstance(settings, ExperimentSettings)
    refuse_own_checkpoint(settings)
    if not settings.description:
        raise PipelineError(f"{shown(files[1].path)} has no description: expected a line `description: ...`")
    return settings


_COMPOSING = "raised while composing config:"


def to_yaml(settings: ExperimentSettings) -> str:
    """The settings as YAML, in the order of their declaration."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))


def one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf in one line instead of many: the reason, then the option that it concerns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    noise = ("object_type", "reference_type", "See https", "To append", "full_key", "Config search path", "provider=")
    kept = [line.rstrip(".") for line in lines if not line.startswith(noise) and not line.endswith(_COMPOSING)]
    reason = "; ".join(dict.fromkeys(kept)) + did_you_mean(str(error))
    if "is not in struct" in reason:  # Hydra says so of dictionaries alone
        reason += "; a new name of a dictionary is given with a plus, as '+OPTION.NAME=VALUE'"
    return f"{reason}; `python -m llm_assets.experiments --explain` prints every option"


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print one experiment's resolved settings, or the list of experiments."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_assets.experiments",
        description=__doc__.split("\n")[0],
        epilog="options, with their defaults:\n\n" + explain.as_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=DEFAULT_EXPERIMENT, help=f"default: {DEFAULT_EXPERIMENT}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as training.max_steps=100 model=rex_30m")
    parser.add_argument("--list", action="store_true", help="print the experiments with their descriptions")
    parser.add_argument("--explain", action="store_true", help="print each option with its meaning, range and default")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="default: configs/ of this repository")
    arguments = parser.parse_args(argv)
    if arguments.list:
        return _print_list(arguments.config_dir)
    settings = compose(arguments.name, arguments.overrides, arguments.config_dir)
    print(explain.as_yaml(settings) if arguments.explain else to_yaml(settings), end="")
    return 0


def _print_list(config_dir: Path) -> int:
    """Print every experiment, then the errors of invalid ones; exits with 1 if there is one."""
    mistakes = list(misnamed_files(config_dir))
    for name in experiment_names(config_dir):
        try:
            print(f"{name:20} {compose(name, config_dir=config_dir).description}")
        except PipelineError as error:
            mistakes.append(str(error))
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return 1 if mistakes else 0
