"""The code location of the container images, separate from the pipeline's, which needs no container engine.

    dagster job execute -m llm_assets.images -j container_image_cpu_job --tags '{"dagster/partition": "smoke"}'
    dagster job execute -m llm_assets.images -j container_image_gpu_job

Both build from the latest `packaged_bento`. The UI shows them downstream of it, in the same graph.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llm_assets.registry import IMAGES
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.containers import ContainerEngine
from llm_assets.side_location import build_side_location


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """A fresh code location; `resource_overrides` replaces resources by key."""
    resources = {"bentos": BentoBuilder(), "containers": ContainerEngine()}
    return build_side_location(IMAGES, {**resources, **(resource_overrides or {})})


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions that Dagster's tools load."""
    return build_defs()
