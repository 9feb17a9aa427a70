"""The corpus: documents read, cleaned and split."""

from collections.abc import Iterator

import dagster as dg

from llm_assets.assets import asset_arguments, checks
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage
from model.settings import ExperimentSettings


def source_fingerprint(settings: ExperimentSettings) -> str:
    """Hash of the source files of the corpus."""
    from model.text.sources import fingerprint

    return fingerprint(settings.corpus)


@dg.asset(
    **asset_arguments("corpus"),
    retry_policy=dg.RetryPolicy(max_retries=1, delay=5),  # a source may be a URL
)
@reuses_unchanged(source_fingerprint)
def corpus(
    context: dg.AssetExecutionContext, hydra: HydraConfig, mlflow: MlflowTracking
) -> Iterator[dg.MaterializeResult]:
    """Documents as Parquet shards (id, text, source, split): cleaned, exact duplicates dropped, split by their content.

    From local files, URLs, a Hugging Face dataset or, by default, the interpreter's standard library.
    """
    from model.system.tasks import tasks
    from model.text.corpus import build_corpus
    from model.text.parts import in_tasks

    with stage(context, hydra, mlflow, fingerprint=source_fingerprint, in_tasks=True) as work:
        with tasks(work.settings.compute) as apply:
            write = in_tasks(apply, work.scratch) if apply else None
            summary = build_corpus(work.settings.corpus, work.output, log=work.log, write=write)
            overlap = checks.splits_share_little_text(work.output, work.log, apply, work.scratch)
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    documents=f"{summary.documents:,}",
                    text=ui_metadata.size(summary.bytes),
                    validation=ui_metadata.size(summary.validation_bytes),
                    mean_document=ui_metadata.size(summary.mean_document_bytes),
                ),
                "picture": ui_metadata.bars(
                    "bytes", {"train": summary.train_bytes, "validation": summary.validation_bytes}, "bytes"
                ),
                "dagster/row_count": summary.documents,
                "dagster/column_schema": dg.TableSchema(
                    [
                        dg.TableColumn("id", "string", description="128-bit BLAKE2b of the text, in hex"),
                        dg.TableColumn("text", "string", description="one document"),
                        dg.TableColumn("source", "string", description="the file or dataset it is from"),
                        dg.TableColumn("split", "string", description="train or validation"),
                    ]
                ),
                **ui_metadata.numbers(summary),
                "documents": summary.documents,
                "bytes": summary.bytes,
                "source": summary.source,
                "license": summary.license,
                "splits": ui_metadata.table(
                    [
                        {"split": "train", "documents": summary.train_documents, "bytes": summary.train_bytes},
                        {
                            "split": "validation",
                            "documents": summary.validation_documents,
                            "bytes": summary.validation_bytes,
                        },
                    ]
                ),
                "sample": dg.MetadataValue.md(ui_metadata.fenced(ui_metadata.wrapped(summary.sample))),
            },
            [checks.splits_are_disjoint(work.output), overlap],
        )
