"""Jobs: the whole pipeline, and one per stage.

Selections are objects, not strings. The executor's limit is explicit: Dagster's default counts the machine's cores, not
the container's share of them. The partition tag lets `dagster job execute -j llm_pipeline` run without a word about
partitions; `--tags '{"dagster/partition": "NAME"}'` picks another experiment.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from llm_assets.experiment import DEFAULT_EXPERIMENT

MAX_CONCURRENT_STEPS = 2

# A step is forked from a process that has imported what every step needs: a fresh interpreter takes 4 s to get there.
# torch stays out of it: threads and GPU contexts do not survive a fork.
executor = dg.multiprocess_executor.configured(
    {
        "max_concurrent": MAX_CONCURRENT_STEPS,
        "start_method": {"forkserver": {"preload_modules": ["llm_assets.definitions", "mlflow"]}},
    }
)


def build_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[Any]:
    """`llm_pipeline` with every asset, and `<asset>_job` for each."""
    whole = _job("llm_pipeline", assets, "From text to a packaged service: every asset of one experiment.")
    return [whole, *stage_jobs(assets)]


def stage_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[Any]:
    """`<asset>_job` for each: that stage alone, from the latest upstream."""
    names = [asset.key.path[-1] for asset in assets]
    return [
        _job(f"{name}_job", [asset], f"Only {name}, from the latest upstream artifacts.")
        for name, asset in zip(names, assets, strict=True)
    ]


def _job(name: str, assets: Sequence[dg.AssetsDefinition], description: str) -> Any:
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*assets),
        description=description,
        run_tags={"dagster/partition": DEFAULT_EXPERIMENT},
    )
