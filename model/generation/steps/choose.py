"""Chooses the implementation of a step, by model and machine or by name.

A new implementation is a subclass of `Step` and a line in STEPS.
"""

import importlib
import logging

from transformers import PreTrainedModel

from model.errors import PipelineError
from model.generation.steps.step import Step

logger = logging.getLogger(__name__)

REFERENCE = "reference"
STEPS = {
    "native": "model.generation.steps.native:NativeStep",
    "graphs": "model.generation.steps.graphs.step:GraphStep",
    REFERENCE: "model.generation.steps.reference:ReferenceStep",
}
"""Module and class of each implementation, the preferred one first."""


def step_class(name: str) -> type[Step]:
    """The class of an implementation. Raises PipelineError for an unknown name."""
    if name not in STEPS:
        names = ", ".join(["auto", *STEPS])
        raise PipelineError(f"step is {name!r}: expected one of {names}")
    module, attribute = STEPS[name].split(":")
    found: type[Step] = getattr(importlib.import_module(module), attribute)
    return found


def available_steps(model: PreTrainedModel) -> list[str]:
    """Names of the implementations that can run a model on this machine, the preferred one first."""
    return [name for name in STEPS if step_class(name).unavailable(model) is None]


def choose_step(model: PreTrainedModel, name: str = "auto") -> type[Step]:
    """The implementation of that name; "auto": the first of STEPS that can run the model, with a log line for each one
    skipped.

    Raises PipelineError if the named one cannot run the model, or is unknown.
    """
    if name != "auto":
        chosen = step_class(name)
        reason = chosen.unavailable(model)
        if reason is not None:
            raise PipelineError(f"step is {name!r}: {reason}; set it to 'auto'")
        return chosen
    for candidate in STEPS:
        chosen = step_class(candidate)
        reason = chosen.unavailable(model)
        if reason is None:
            return chosen
        logger.info("the step %s is not used: %s", candidate, reason)
    raise PipelineError(f"no step can run the model on {model.device}")
