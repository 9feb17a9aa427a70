"""Memoization: a stage with unchanged settings, upstream, source files and code reuses its artifact.

Before a step computes, `reuses_unchanged` compares the latest artifact's manifest with what this run would record. If
they are equal, the materialization names that artifact again, with its numbers and checks. The run tag
`rex/force: true`, or the field `force` of the resource `hydra`, recomputes anyway.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import DirectoryIOManager, Reused
from llm_assets.artifacts.manifest import Manifest, stage_config
from llm_assets.experiments.observed import changed_options
from llm_assets.failures import no_retry_after_termination, permanent_failures
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage.code import code_digest, code_version
from llm_assets.stage.evidence import champion_comparison, measured_model
from llm_assets.versions.measurements import measurements
from model.errors import PipelineError
from model.settings import ExperimentSettings

FORCE_TAG = "rex/force"
_OF_IO_MANAGER = ("dagster/uri", "version", "unchanged", "path")
"""Metadata that the IO manager adds; `path` is that of an older release."""
SourceFingerprint = Callable[[ExperimentSettings], str]
Outdated = Callable[[Path, Mapping[str, Any]], str]
_Compute = Callable[..., Iterator[dg.MaterializeResult]]


def reuses_unchanged(
    fingerprint: SourceFingerprint | None = None, outdated: Outdated | None = None
) -> Callable[[_Compute], _Compute]:
    """Decorate an asset's function, which then runs only if the latest artifact is stale.

    fingerprint: of the stage's inputs other than its upstream, such as files that the settings name.
    outdated: for an artifact that names something in another store: why that is not what the stage would make now, or
    "". Called with the artifact's folder and the step's resources and inputs by name.
    """

    def decorate(compute: _Compute) -> _Compute:
        @functools.wraps(compute)
        def once(context: dg.AssetExecutionContext, **arguments: Any) -> Iterator[dg.MaterializeResult]:
            hydra: HydraConfig = arguments["hydra"]
            if not (hydra.force or context.run.tags.get(FORCE_TAG) == "true"):
                upstream = {name: path for name, path in arguments.items() if isinstance(path, Path)}
                again = None
                with no_retry_after_termination(context), permanent_failures():
                    found = _find_unchanged(context, hydra, upstream, fingerprint)
                    why = outdated(found[0], arguments) if found and outdated else ""
                    if why:
                        context.log.info(f"{context.asset_key.path[-1]} is made again: {why}")
                        found = None
                    if found:
                        again = _materialize_again(context, hydra, arguments["mlflow"], upstream, *found)
                if again:
                    yield again
                    return
            yield from compute(context, **arguments)

        return once

    return decorate


def _find_unchanged(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    upstream: Mapping[str, Path],
    fingerprint: SourceFingerprint | None,
) -> tuple[Path, Manifest] | None:
    """The latest artifact, verified, and its manifest, if it is up to date with this run; else None."""
    asset, experiment = context.asset_key.path[-1], context.partition_key
    settings = hydra.settings(experiment)
    store = DirectoryIOManager().store()
    latest = store.latest_manifest(asset, experiment)
    if latest is None or latest.failed_checks:
        return None
    hashes = {name: Manifest.read(path).content_hash for name, path in upstream.items()}
    expected = {
        "the settings": (latest.config, stage_config(settings, asset)),
        "the upstream": (latest.upstream, hashes),
        "the code version": (latest.code_version, code_version(context)),
        "the code": (latest.code, code_digest(asset)),
        "the source": (latest.source, fingerprint(settings) if fingerprint else ""),
    }
    changed = [name for name, (before, now) in expected.items() if before != now]
    if changed:
        if "the settings" in changed:
            changed[:1] = changed_options(latest.config, stage_config(settings, asset)) or ["the settings"]
        context.log.info(
            f"{asset} of {experiment!r} is recomputed: changed since version {latest.version}: {', '.join(changed)}"
        )
        return None
    try:
        return store.load(asset, experiment), latest
    except PipelineError as error:
        context.log.warning(f"{asset} of {experiment!r} is recomputed: {error}")
        return None


def _materialize_again(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    upstream: Mapping[str, Path],
    path: Path,
    manifest: Manifest,
) -> dg.MaterializeResult:
    """A materialization that names a published artifact, with the metadata of the materialization that made it."""
    context.log.info(
        f"unchanged: {manifest.asset} of {manifest.experiment!r} already has version {manifest.version} "
        f"(the tag {FORCE_TAG}=true recomputes it)"
    )
    settings, dataset = hydra.settings(manifest.experiment), upstream.get("tokenized_dataset")
    if manifest.registration:
        compare = champion_comparison(path, dataset, settings) if dataset else None
        mlflow.register_again(context, manifest, path, compare)
    elif measured := measured_model(manifest.asset, settings):
        found = measurements(path, settings.evaluation.num_fewshot)
        compare = champion_comparison(upstream[measured], dataset, settings) if dataset else None
        mlflow.measure_again(context, Manifest.read(upstream[measured]), found, compare)
    metadata, measured_by = _earlier_metadata(context, manifest)
    checks = [
        # The artifact has passed its blocking checks.
        dg.AssetCheckResult(
            check_name=name,
            passed=name not in manifest.warned_checks,
            severity=dg.AssetCheckSeverity.WARN if name in manifest.warned_checks else dg.AssetCheckSeverity.ERROR,
            metadata={**measured_by.get(name, {}), "version": manifest.version},
        )
        for name in (spec.name for spec in context.assets_def.check_specs)
    ]
    return dg.MaterializeResult(
        value=Reused(str(path), manifest.version),
        data_version=dg.DataVersion(manifest.content_hash),
        metadata=metadata,
        check_results=checks,
    )


def _earlier_metadata(
    context: dg.AssetExecutionContext, manifest: Manifest
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Metadata of this version's newest materialization, without the IO manager's, and that of its checks by name.

    Both are empty on another instance.
    """
    records = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[manifest.experiment]), limit=1
    ).records
    event = records[0].asset_materialization if records else None
    if event is None or (event.tags or {}).get("dagster/data_version") != manifest.content_hash:
        return {}, {}
    evaluated = context.instance.all_logs(records[0].run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    evaluations = [entry.dagster_event.asset_check_evaluation_data for entry in evaluated if entry.dagster_event]
    return (
        {name: value for name, value in event.metadata.items() if name not in _OF_IO_MANAGER},
        {found.check_name: found.metadata for found in evaluations if found.asset_key == context.asset_key},
    )
