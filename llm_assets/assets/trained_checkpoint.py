"""The model in full precision."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from llm_assets.artifacts.io_manager import remote_scratch
from llm_assets.assets import asset_arguments, checks
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import Registration, stage
from model.settings import CorpusSettings, ExperimentSettings


def preference_files(settings: ExperimentSettings) -> str:
    """Hash of the files of preferences; empty without them."""
    from model.text.sources import fingerprint

    paths = settings.training.preferences
    return fingerprint(CorpusSettings(source="files", paths=paths)) if paths else ""


@dg.asset(
    **asset_arguments("trained_checkpoint"),
    retry_policy=dg.RetryPolicy(max_retries=1, delay=10),  # resumes from the last checkpoint
)
@reuses_unchanged(preference_files)
def trained_checkpoint(
    context: dg.AssetExecutionContext, hydra: HydraConfig, mlflow: MlflowTracking, tokenized_dataset: Path
) -> Iterator[dg.MaterializeResult]:
    """`RexForCausalLM` in safetensors with its tokenizer, code, model card, curves and samples.

    A killed, retried or re-executed run resumes from its last checkpoint, on another machine too if
    LLM_ASSETS_CHECKPOINTS names a place for copies.
    """
    from model.baselines import token_baselines
    from model.training.checkpoints.remote import RemoteCheckpoints
    from model.training.launch.start import launch
    from model.training.preference.tuning import tune_preferences

    upstream = {"tokenized_dataset": tokenized_dataset}
    with stage(context, hydra, mlflow, upstream, resumable=True, exclusive=True, fingerprint=preference_files) as work:
        folders = tokenized_dataset, work.output, work.scratch
        if work.settings.training.preferences:
            summary = tune_preferences(work.settings, *folders, log=work.log, on_metrics=work.live)
        else:
            url = remote_scratch(work.scratch.parent)
            remote = RemoteCheckpoints(url, work.scratch, work.log) if url else None
            if remote:
                work.after_publishing = remote.remove
            summary = launch(work.settings, *folders, log=work.log, on_metrics=work.live, remote=remote)
        baselines = token_baselines(tokenized_dataset, work.settings.tokenizer.sequence_length)
        for name in ("loss.png", "README.md", "curves.json", "progress.md"):
            work.tracked.log_artifact(work.output / name)
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    parameters=f"{summary.parameters:,}",
                    **{
                        "bits per byte, validation split": f"{summary.bits_per_byte:.4f}",
                        "validation loss, nats per token": f"{summary.validation_loss:.4f}",
                        "training steps": f"{summary.steps:,}",
                        "training, tokens per second": f"{summary.tokens_per_second:,.0f}",
                    },
                ),
                "picture": ui_metadata.line(
                    "training loss by step", ui_metadata.curve(work.output / "curves.json", "loss")
                ),
                **ui_metadata.numbers(summary),
                "precision": summary.precision,
                "device": summary.device,
                "loss_curve": ui_metadata.picture(work.output / "loss.png"),
                "samples": ui_metadata.samples(summary.samples),
                **(
                    {"sources": ui_metadata.table([{"source": k, **v} for k, v in summary.sources.items()])}
                    if summary.sources
                    else {}
                ),
                "progress": ui_metadata.text(work.output / "progress.md", wrap=True),
            },
            [
                checks.beats_baselines(
                    summary.validation_loss,
                    summary.bits_per_byte,
                    uniform=baselines.uniform,
                    unigram=baselines.unigram,
                ),
                checks.trains_soundly(summary.warnings),
            ],
            registration=Registration(
                bits_per_byte=summary.bits_per_byte,
                evaluation_text=work.upstream["tokenized_dataset"].upstream["corpus"],
                candidate=not work.settings.serving.quantized and not summary.warnings,
            ),
            dataset=tokenized_dataset,
        )
