"""The inputs of a run as external assets: an experiment's settings and its source text.

There is one asset for each group of options, and one for the source text. The data version is a hash of the group's
options, or of the text's address. When an option changes, Dagster shows the stages that read its group as out of date,
because `training_settings`, for example, has a new data version; that asset's page names the changed options with both
values. Events come from each step of a run, with the run's overrides (`resources/hydra.py`), and from the sensor
`settings`, with the current files (`automation.py`). Each change is two events: Dagster compares the data versions of
observations, and its pages show the metadata of materializations.
"""

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.artifacts.manifest import config_hash, flatten, stage_config
from llm_assets.experiments.partitions import experiments
from llm_assets.registry import PIPELINE, SOURCE_TEXT, settings_asset
from model.settings import GROUPS, CorpusSettings, ExperimentSettings, options

GROUP_NAME = "settings"
FIRST = "nothing: this is the first observation"
_VERSION_DIGITS = 16
_VERSION_TAG = "dagster/data_version"
_INPUT_TAG = "dagster/input_event_pointer"
"""Before the name of an asset, on a materialization that was made from it: the event that was the newest then."""


def external_specs() -> list[dg.AssetSpec]:
    """The external assets."""
    source = dg.AssetSpec(
        SOURCE_TEXT,
        description="Where the documents come from: a folder, files, URLs or a dataset, by their addresses. Assets "
        "made from another address are out of date; changed files are noticed by the run.",
        group_name="data",
        kinds={"file"},
        owners=["team:llm"],
        partitions_def=experiments,
    )
    return [source, *settings_specs()]


def settings_specs() -> list[dg.AssetSpec]:
    """One external asset for each group of options that a stage reads."""
    read = {group for stage in PIPELINE for group in stage.settings}
    return [
        dg.AssetSpec(
            settings_asset(group),
            description=f"{(kind.__doc__ or '').splitlines()[0]} The options `{group}.*` of each experiment, from "
            f"`configs/{group}/`, `configs/experiment/` and overrides. Stages that read them are out of date once one "
            "changes; the newest event names it.",
            group_name=GROUP_NAME,
            kinds={"yaml"},
            owners=["team:llm"],
            partitions_def=experiments,
        )
        for group, kind in GROUPS.items()
        if group in read
    ]


def source_uris(settings: CorpusSettings) -> list[str]:
    """The addresses of the text, as globs where the settings have globs."""
    match settings.source:
        case "stdlib" | "docstrings":
            return [Path(sysconfig.get_path("stdlib")).as_uri()]
        case "huggingface" if not Path(settings.dataset).is_dir():
            return [f"hf://datasets/{settings.dataset}"]
        case "huggingface":
            return [Path(settings.dataset).absolute().as_uri()]
        case "mixture":
            return [uri for part in settings.parts.values() for uri in source_uris(part)]
    return [path if "://" in path else f"file://{Path(path).absolute()}" for path in settings.paths]


def changes(
    instance: dg.DagsterInstance, experiment: str, settings: ExperimentSettings
) -> list[dg.AssetObservation | dg.AssetMaterialization]:
    """Events for each asset that differs from its newest materialization, in the order to report them in.

    A materialization follows its observation: Dagster looks for observations that are newer than the event that a run
    has read, which is the materialization.
    """
    uris = source_uris(settings.corpus)
    shown: dict[str, dict[str, Any]] = {SOURCE_TEXT: _addresses(uris, settings.corpus.license)}
    values: dict[str, Any] = {SOURCE_TEXT: {"uri": uris}}
    for stage in PIPELINE:
        for group, found in stage_config(settings, stage.name).items():
            shown[settings_asset(group)] = _options(group, found)
            values[settings_asset(group)] = found
    events: list[dg.AssetObservation | dg.AssetMaterialization] = []
    for asset, now in values.items():
        key, version = dg.AssetKey(asset), config_hash(now)[:_VERSION_DIGITS]
        newest = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[experiment])
        records = instance.fetch_materializations(newest, limit=1).records
        before = records[0].asset_materialization if records else None
        if before and (before.tags or {}).get(_VERSION_TAG) == version:
            continue
        group = asset.removesuffix("_settings")
        changed = "; ".join(changed_options({group: _values(before)}, {group: now})) if before else ""
        common: dict[str, Any] = {
            "partition": experiment,
            "description": changed or None,
            "tags": {_VERSION_TAG: version},
        }
        said = {"changed": changed or FIRST}
        events.append(dg.AssetObservation(key, metadata=said, **common))
        values_now = {"values": dg.MetadataValue.json(now)}
        events.append(dg.AssetMaterialization(key, metadata={**said, **shown[asset], **values_now}, **common))
    return events


def changed_since(
    instance: dg.DagsterInstance, asset: Sequence[str], settings: Sequence[str], experiment: str
) -> list[str]:
    """`changed_options` of a group of settings since an asset of the experiment was made from it.

    asset, settings: paths of their keys. Empty if the asset was not made from such a group.
    """

    def newest(key: dg.AssetKey, before: int | None = None) -> dg.AssetMaterialization | None:
        wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[experiment], before_storage_id=before)
        records = instance.fetch_materializations(wanted, limit=1).records
        return records[0].asset_materialization if records else None

    made, group = newest(dg.AssetKey(asset)), dg.AssetKey(settings)
    read = ((made and made.tags) or {}).get(f"{_INPUT_TAG}/{group.to_user_string()}", "")
    then, now = (newest(group, int(read) + 1), newest(group)) if read.isdigit() else (None, None)
    if then is None or now is None:
        return []
    name = settings[-1].removesuffix("_settings")
    return changed_options({name: _values(then)}, {name: _values(now)})


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


def _values(event: dg.AssetMaterialization) -> Mapping[str, Any]:
    found = event.metadata.get("values")
    return found.value if isinstance(found, dg.JsonMetadataValue) and isinstance(found.value, dict) else {}


def _addresses(uris: list[str], license_name: str) -> dict[str, Any]:
    """Metadata of the source text; a single web address is a link."""
    text = "\n".join(uris)
    is_link = len(uris) == 1 and uris[0].startswith(("http://", "https://"))
    return {"dagster/uri": dg.MetadataValue.url(text) if is_link else text, "license": license_name}


def _options(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Each option with its value, and with its meaning and default; a page has no room for one table of all."""
    items = options(GROUPS[group])
    rows = [dg.TableRecord({"option": item.name, "value": str(values.get(item.name))}) for item in items]
    meanings = [f"- `{item.name}`: {item.text} Default: {item.default_text}" for item in items]
    return {"options": dg.MetadataValue.table(records=rows), "meanings": dg.MetadataValue.md("\n".join(meanings))}
