"""Composes an experiment's settings from `configs/` with Hydra.

    python -m llm_assets.experiments NAME [overrides]     prints the resolved settings as YAML
    python -m llm_assets.experiments --list               prints the experiments

`name` is a file of `configs/experiment/`; an override is Hydra's `group.option=value` or `group=file`. Composing reads
nothing but the files, the overrides and the environment variables that the files name, so that every step of a run
resolves the same settings.
"""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_assets.paths import REPOSITORY
from model.errors import PipelineError, ends_in_one_line
from model.settings import ExperimentSettings

CONFIG_DIR = Path(os.environ.get("LLM_ASSETS_CONFIG_DIR") or REPOSITORY / "configs")
DEFAULT_EXPERIMENT = "stdlib"
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException)
"""What a mistake in a configuration or an override raises in Hydra; `one_line` says it."""

ConfigStore.instance().store(name="settings", node=ExperimentSettings)


def experiment_names(config_dir: Path = CONFIG_DIR) -> list[str]:
    """Names of the experiments in `config_dir`, sorted."""
    return sorted(path.stem for path in (config_dir / "experiment").glob("*.yaml"))


def compose(name: str, overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR) -> ExperimentSettings:
    """Resolve experiment `name` with Hydra overrides applied.

    Raises PipelineError, one line, for an experiment that is not there, an option that is not there, a value of the
    wrong type and a value out of range.
    """
    names = experiment_names(config_dir)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PipelineError(f"no experiment {name!r} in {config_dir / 'experiment'}: expected one of {names}{hint}")
    try:
        with initialize_config_dir(str(config_dir.resolve())):
            composed = hydra_compose("config", [f"experiment={name}", *overrides, f"++name={name}"])
        # Hydra's `+group.option=` opens the tree for keys that no setting has: merging once more refuses them.
        typed = OmegaConf.merge(OmegaConf.structured(ExperimentSettings), OmegaConf.to_container(composed))
        settings = OmegaConf.to_object(typed)
    except COMPOSING_ERRORS as error:
        raise PipelineError(f"experiment {name!r} with {list(overrides)}: {one_line(error)}") from error
    assert isinstance(settings, ExperimentSettings)
    return settings


def to_yaml(settings: ExperimentSettings) -> str:
    """The settings as YAML, in the order of their declaration."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's many lines as one: the reason, then the option that it concerns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    noise = ("object_type", "reference_type", "See https", "To append", "full_key", "Config search path", "provider=")
    kept = [line.rstrip(".") for line in lines if not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept)) + "; `python -m llm_assets.experiments` prints every option"


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print one experiment's resolved settings, or the list of experiments."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.experiments", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", default=DEFAULT_EXPERIMENT, help=f"default: {DEFAULT_EXPERIMENT}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as training.max_steps=100 model=rex_30m")
    parser.add_argument("--list", action="store_true", help="print the experiments and what each is")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="default: configs/ of this repository")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name in experiment_names(arguments.config_dir):
            print(f"{name:20} {compose(name, config_dir=arguments.config_dir).description}")
    else:
        print(to_yaml(compose(arguments.name, arguments.overrides, arguments.config_dir)), end="")
    return 0
