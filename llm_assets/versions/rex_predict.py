"""Loads a registered model for `mlflow.pyfunc`; a copy travels with each version and imports MLflow alone.

    mlflow.pyfunc.load_model("models:/rex-smoke@champion").predict("def ")

MLflow's loader of transformers models warns at each call that the parameters of `predict` replace saved ones. Those of
a REX model are its signature, which always has values, and none are saved.
"""

import logging
from typing import Any

IRRELEVANT = "params provided to the `predict` method will override"


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Any:
    """The name by which MLflow finds a loader. Returns MLflow's wrapper of the pipeline."""
    from mlflow import transformers

    logger = logging.getLogger(transformers.__name__)
    if _is_relevant not in logger.filters:
        logger.addFilter(_is_relevant)
    return transformers._load_pyfunc(path, model_config)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(IRRELEVANT)
