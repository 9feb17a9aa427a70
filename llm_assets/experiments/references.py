"""Checkpoints that settings name by experiment: `latest:NAME` is the newest trained_checkpoint of experiment NAME.

References are resolved when a stage begins, not when an experiment is composed, which reads only files of `configs/`.
A stage records the folder, whose name is the checkpoint's content hash, so a newer checkpoint makes its artifact stale.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model.errors import PipelineError
from model.settings import ExperimentSettings

PREFIX = "latest:"
_OPTIONS = (("tokenizer", "path"), ("training", "init_from"), ("training", "distill_from"))


def refuse_own_checkpoint(settings: ExperimentSettings) -> None:
    """Raise PipelineError if an option names the newest checkpoint of the experiment itself.

    The stages after the training would resolve it to the checkpoint that their own run has made.
    """
    for group, option in _OPTIONS:
        if getattr(getattr(settings, group), option) == f"{PREFIX}{settings.name}":
            raise PipelineError(
                f"{group}.{option} is '{PREFIX}{settings.name}', the checkpoint that a run of {settings.name!r} "
                "replaces: run another experiment, such as a copy of its file, or give the checkpoint's folder"
            )


def resolve(settings: ExperimentSettings, checkpoint_of: Callable[[str], Path]) -> ExperimentSettings:
    """The settings with the folders in place of the names.

    checkpoint_of: an experiment's name to its newest checkpoint; it raises PipelineError if there is none.

    Raises that error with the option's name before it.
    """
    for group, option in _OPTIONS:
        value = getattr(getattr(settings, group), option)
        if value.startswith(PREFIX):
            try:
                folder = str(checkpoint_of(value.removeprefix(PREFIX)))
            except PipelineError as error:
                raise PipelineError(f"{group}.{option}={value}: {error}") from error
            settings = replace(settings, **{group: replace(getattr(settings, group), **{option: folder})})
    return settings
