"""The assets, one module each: settings -> one call into `model` or `bench` -> metadata.

Their names, upstream, versions and checks are entries of `llm_assets/registry.py`.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import ArtifactDirectory
from llm_assets.assets import checks
from llm_assets.experiments.partitions import experiments
from llm_assets.registry import PIPELINE, StageSpec, settings_asset, stage_spec

SETTINGS = dg.AssetSelection.assets(*(settings_asset(group) for stage in PIPELINE for group in stage.settings))
AFTER_UPSTREAM = dg.AutomationCondition.eager().ignore(SETTINGS)
"""Materializes an asset once its upstream is newer.

Not after changed settings, as a run with overrides and the sensor `settings` report theirs in turn.
"""


def asset_arguments(name: str) -> dict[str, Any]:
    """The keyword arguments of `dg.asset` for the registry's stage `name`."""
    spec = stage_spec(name)
    return {
        "name": spec.name,
        "description": spec.description,
        "group_name": spec.group,
        "kinds": set(spec.kinds),
        "metadata": code_reference(spec),
        "code_version": spec.code_version,
        "pool": spec.pool,
        "check_specs": checks.specs(name),
        "partitions_def": experiments,
        "deps": [*spec.external, *(settings_asset(group) for group in spec.settings)],
        "owners": ["team:llm"],
        "io_manager_key": "artifacts",
        "automation_condition": AFTER_UPSTREAM if spec.eager else None,
        "dagster_type": ArtifactDirectory,
    }


def code_reference(spec: StageSpec) -> dict[str, Any]:
    """Metadata with the file that declares the asset, which the asset's page opens in an editor.

    `dg.with_source_code_references` would name the file of the decorator `reuses_unchanged`.
    """
    found = importlib.util.find_spec(spec.module or f"{__name__}.{spec.name}")
    if found is None or found.origin is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        reference = dg.LocalFileCodeReference(file_path=found.origin, label=Path(found.origin).name)
        return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[reference])}


def load_asset(spec: StageSpec) -> dg.AssetsDefinition:
    """Import a stage's module and return its asset; its inputs must equal the registry's upstream.

    Raises TypeError otherwise.
    """
    module = importlib.import_module(spec.module or f"{__name__}.{spec.name}")
    asset: dg.AssetsDefinition = getattr(module, spec.name)
    external = {*spec.external, *(settings_asset(group) for group in spec.settings)}
    inputs = {key.path[-1] for key in asset.dependency_keys} - external
    if inputs != set(spec.upstream):
        raise TypeError(f"{spec.name} takes {sorted(inputs)}: its entry in the registry says {sorted(spec.upstream)}")
    return asset
