"""The corpus as token windows, and the tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from llm_assets.assets import asset_arguments, checks
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage

SHOWN_TOKENS = 10
"""Most common tokens on the asset's page; the artifact's summary.json has more."""


@dg.asset(**asset_arguments("tokenized_dataset"))
@reuses_unchanged()
def tokenized_dataset(
    context: dg.AssetExecutionContext, hydra: HydraConfig, mlflow: MlflowTracking, corpus: Path
) -> Iterator[dg.MaterializeResult]:
    """A tokenizer trained on the train split, and both splits as memory-mapped tokens with document boundaries.

    Includes the byte length of each token, so that bits per byte are exact.
    """
    from model.system.tasks import tasks
    from model.text.shards import by_shards
    from model.text.tokens import build_tokenized_dataset

    with stage(context, hydra, mlflow, {"corpus": corpus}, in_tasks=True) as work:
        settings = work.settings.tokenizer
        with tasks(work.settings.compute) as apply:
            encode = by_shards(apply, work.scratch) if apply else None
            summary = build_tokenized_dataset(settings, corpus, work.output, log=work.log, encode=encode)
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    train=f"{summary.train_tokens:,} tokens",
                    validation=f"{summary.validation_tokens:,} tokens",
                    vocabulary=f"{summary.vocab_size:,} tokens",
                    compression=f"{summary.bytes_per_token:.2f} bytes per token",
                ),
                "picture": ui_metadata.bars(
                    "tokens", {"train": summary.train_tokens, "validation": summary.validation_tokens}, " tokens"
                ),
                **ui_metadata.numbers(summary),
                "kind": summary.kind,
                "dtype": summary.dtype,
                "most_common_tokens": ui_metadata.table(
                    [{**row, "token": ui_metadata.quoted(row["token"])} for row in summary.most_common[:SHOWN_TOKENS]]
                ),
            },
            [checks.round_trip_is_exact(corpus, work.output, settings.sequence_length)],
        )
