"""The documents that everything is made from."""

from collections.abc import Iterator

import dagster as dg

from llm_assets import checks
from llm_assets.assets import asset_arguments
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as show
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage
from model.settings import ExperimentSettings


def source_fingerprint(settings: ExperimentSettings) -> str:
    """Hash of the files that the corpus is made from."""
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

    From local files, URLs, a Hugging Face data set or, by default, the Python standard library of the interpreter.
    """
    from model.text.corpus import build_corpus

    with stage(context, hydra, mlflow, fingerprint=source_fingerprint) as work:
        summary = build_corpus(work.settings.corpus, work.output, log=work.log)
        yield work.result(
            {
                "summary": show.summary(
                    documents=f"{summary.documents:,}",
                    text=show.size(summary.bytes),
                    validation=show.size(summary.validation_bytes),
                    mean_document=show.size(summary.mean_document_bytes),
                ),
                "picture": show.bars("bytes", {"train": summary.train_bytes, "validation": summary.validation_bytes}),
                "dagster/row_count": summary.documents,
                "dagster/column_schema": dg.TableSchema(
                    [
                        dg.TableColumn("id", "string", description="128-bit BLAKE2b of the text, in hex"),
                        dg.TableColumn("text", "string", description="one document"),
                        dg.TableColumn("source", "string", description="the file or dataset it is from"),
                        dg.TableColumn("split", "string", description="train or validation"),
                    ]
                ),
                **show.numbers(summary),
                "documents": summary.documents,
                "bytes": summary.bytes,
                "source": summary.source,
                "license": summary.license,
                "splits": show.table(
                    [
                        {"split": "train", "documents": summary.train_documents, "bytes": summary.train_bytes},
                        {
                            "split": "validation",
                            "documents": summary.validation_documents,
                            "bytes": summary.validation_bytes,
                        },
                    ]
                ),
                "sample": dg.MetadataValue.md(show.fenced(summary.sample)),
            },
            [checks.splits_are_disjoint(work.output)],
        )
