"""An experiment's settings as assets: one for each group of options, observed but never materialized.

The data version is a hash of the group's options. When an option changes, Dagster shows the stages that read its group
as out of date, because `training_settings`, for example, has a new data version; that asset's newest observation names
the changed options with both values. Observations come from each step of a run, with the run's overrides
(`resources/hydra.py`), and from the sensor `settings`, with the current files (`automation.py`).
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llm_assets.artifacts.manifest import config_hash, flatten, stage_config
from llm_assets.experiments.partitions import experiments
from llm_assets.registry import PIPELINE, settings_asset
from model.settings import GROUPS, ExperimentSettings, options

GROUP_NAME = "settings"
_VERSION_DIGITS = 16


def settings_specs() -> list[dg.AssetSpec]:
    """One external asset for each group of options that a stage reads."""
    read = {group for stage in PIPELINE for group in stage.settings}
    return [
        dg.AssetSpec(
            settings_asset(group),
            description=f"{(kind.__doc__ or '').splitlines()[0]} The options `{group}.*` of each experiment, from "
            f"`configs/{group}/`, `configs/experiment/` and overrides. Stages that read them are out of date once one "
            "changes; the newest observation names it.",
            group_name=GROUP_NAME,
            kinds={"yaml"},
            owners=["team:llm"],
            partitions_def=experiments,
        )
        for group, kind in GROUPS.items()
        if group in read
    ]


def observations(
    instance: dg.DagsterInstance, experiment: str, settings: ExperimentSettings
) -> list[dg.AssetObservation]:
    """An observation for each group that has changed since its newest one."""
    groups: dict[str, Any] = {}
    for stage in PIPELINE:
        groups |= stage_config(settings, stage.name)
    found = []
    for group, values in groups.items():
        key, version = dg.AssetKey(settings_asset(group)), config_hash(values)[:_VERSION_DIGITS]
        filtered = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[experiment])
        records = instance.fetch_observations(filtered, limit=1).records
        before = records[0].asset_observation if records else None
        if before and (before.tags or {}).get("dagster/data_version") == version:
            continue
        changed = changed_options({group: _values(before)}, {group: values}) if before else []
        found.append(
            dg.AssetObservation(
                key,
                partition=experiment,
                description="; ".join(changed) or None,
                metadata={
                    "changed": "; ".join(changed) or "nothing: this is the first observation",
                    "options": _table(group, values),
                    "values": dg.MetadataValue.json(values),
                },
                tags={"dagster/data_version": version},
            )
        )
    return found


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`group.option is 900, was 800` for each option that differs between two mappings by group."""
    old, new = flatten(before), flatten(now)
    lines = []
    for name in dict.fromkeys([*new, *old]):
        if name not in old:
            lines.append(f"{name} is {new[name]!r}, was not an option")
        elif name not in new:
            lines.append(f"{name} is no longer an option")
        elif old[name] != new[name]:
            lines.append(f"{name} is {new[name]!r}, was {old[name]!r}")
    return lines


def _values(observation: dg.AssetObservation) -> Mapping[str, Any]:
    found = observation.metadata.get("values")
    return found.value if isinstance(found, dg.JsonMetadataValue) and isinstance(found.value, dict) else {}


def _table(group: str, values: Mapping[str, Any]) -> dg.MetadataValue:
    """Each option with its value, default and meaning."""
    rows = [
        dg.TableRecord(
            {
                "option": item.full_name,
                "value": str(values.get(item.name)),
                "default": item.default_text,
                "meaning": item.text,
            }
        )
        for item in options(GROUPS[group])
    ]
    return dg.MetadataValue.table(records=rows)
