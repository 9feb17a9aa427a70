"""The code location of scores on tasks of lm-eval, separate from the pipeline's, which needs none of it.

    dagster job execute -m llm_assets.evaluation -j evaluation_report_job

It scores the latest checkpoint or quantized model on `evaluation.tasks`. The UI shows it downstream of them, in the
same graph.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llm_assets.registry import EVALUATION
from llm_assets.side_location import build_side_location


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """A fresh code location; `resource_overrides` replaces resources by key."""
    return build_side_location(EVALUATION, resource_overrides or {})


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions that Dagster's tools load."""
    return build_defs()
