"""The weights that are served."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from llm_assets.assets import asset_arguments, checks
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import Registration, stage


@dg.asset(**asset_arguments("quantized_model"))
@reuses_unchanged()
def quantized_model(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    trained_checkpoint: Path,
    tokenized_dataset: Path,
) -> Iterator[dg.MaterializeResult]:
    """The checkpoint's weights in int8 or int4 (or as they are, method `none`), with the measured loss in quality."""
    from model.quantization import quantize_checkpoint

    upstream = {"trained_checkpoint": trained_checkpoint, "tokenized_dataset": tokenized_dataset}
    with stage(context, hydra, mlflow, upstream) as work:
        summary = quantize_checkpoint(
            work.settings.quantization,
            trained_checkpoint,
            tokenized_dataset,
            work.output,
            sequence_length=work.settings.tokenizer.sequence_length,
            log=work.log,
        )
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    method=summary.method,
                    weights=ui_metadata.size(summary.bytes_after),
                    weights_in_full_precision=ui_metadata.size(summary.bytes_before),
                    **{
                        f"bits per byte, {summary.evaluated_tokens:,} tokens": f"{summary.bits_per_byte_after:.4f}",
                        "the same, in full precision": f"{summary.bits_per_byte_before:.4f}",
                    },
                    same_most_likely_token=f"{summary.top1_agreement:.1%}",
                    measured_through=f"{summary.step} step",
                ),
                "picture": ui_metadata.bars(
                    "bytes of the weights",
                    {"full precision": summary.bytes_before, "quantized": summary.bytes_after},
                    "bytes",
                ),
                **ui_metadata.numbers(summary),
                "method": summary.method,
                "scheme": summary.scheme,
            },
            [checks.keeps_quality(summary.bits_per_byte_after, summary.bits_per_byte_before)],
            registration=Registration(
                bits_per_byte=summary.bits_per_byte_after,
                evaluation_text=f"{work.upstream['tokenized_dataset'].content_hash} {summary.evaluated_tokens} tokens",
                candidate=work.settings.serving.quantized and not checks.training_warnings(trained_checkpoint),
            ),
            dataset=tokenized_dataset,
        )
