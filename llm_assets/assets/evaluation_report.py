"""Scores of a model on tasks of lm-eval.

It is in a separate code location (`llm_assets.evaluation`), since the pipeline needs neither lm-eval nor tasks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from llm_assets.assets import asset_arguments
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.evidence import measured_model
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage
from model.settings import ExperimentSettings


def fingerprint(settings: ExperimentSettings) -> str:
    """The release of lm-eval and a hash of the files of `evaluation.include_path`."""
    from bench.report.tasks import harness_release

    found = hashlib.sha256()
    folder = settings.evaluation.include_path
    for path in sorted(Path(folder).rglob("*")) if folder else ():
        if path.is_file():
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return f"lm-eval {harness_release()} {found.hexdigest()}"


@dg.asset(**asset_arguments("evaluation_report"))
@reuses_unchanged(fingerprint)
def evaluation_report(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    trained_checkpoint: Path,
    quantized_model: Path,
) -> Iterator[dg.MaterializeResult]:
    """Scores on tasks of lm-eval, of the trained or the quantized model: JSON and Markdown."""
    from bench.report.tasks import REPORT, score_tasks
    from model.system.tasks import tasks

    upstream = {"trained_checkpoint": trained_checkpoint, "quantized_model": quantized_model}
    with stage(context, hydra, mlflow, upstream, exclusive=True, fingerprint=fingerprint) as work:
        scored = measured_model(work.asset, work.settings) or "trained_checkpoint"
        compute, folders = work.settings.compute, (upstream[scored], work.output)
        with tasks(compute, gpus=compute.gpus_per_process) as apply:
            scores = score_tasks(work.settings.evaluation, *folders, log=work.log, apply=apply or map)
        work.tracked.log_artifact(work.output)
        values = {f"{score.task} {score.metric}": score.value for score in scores}
        yield work.result(
            {
                "summary": ui_metadata.summary(**{name: f"{value:.4f}" for name, value in values.items()}),
                "picture": ui_metadata.bars("scores", values, ""),
                **ui_metadata.numbers(values),
                "model": scored,
                "scores": ui_metadata.table([asdict(score) for score in scores]),
                "report": ui_metadata.text(work.output / REPORT),
            }
        )
