"""The model for other engines, with certificates that they compute the same."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from llm_assets.assets import asset_arguments, checks
from llm_assets.registry import model_name
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage
from model.settings import ExperimentSettings


def fingerprint(settings: ExperimentSettings) -> str:
    """Fingerprint of the certifying engines: another release or engine renews the certificates."""
    from model.export.engines import installed_engines

    return ", ".join(f"{engine} {release}" for engine, release in installed_engines().items())


@dg.asset(**asset_arguments("exported_model"))
@reuses_unchanged(fingerprint)
def exported_model(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    trained_checkpoint: Path,
    quantized_model: Path,
    tokenized_dataset: Path,
) -> Iterator[dg.MaterializeResult]:
    """The checkpoint in the formats of transformers, vLLM, llama.cpp and Ollama, with a certificate for each engine."""
    from model.export.certified import export_with_certificates
    from model.export.parity import as_rows

    upstream = {
        "trained_checkpoint": trained_checkpoint,
        "quantized_model": quantized_model,
        "tokenized_dataset": tokenized_dataset,
    }
    # Exclusive, because its load would distort the timings of a benchmark.
    with stage(context, hydra, mlflow, upstream, exclusive=True, fingerprint=fingerprint) as work:
        found = export_with_certificates(
            trained_checkpoint,
            quantized_model,
            tokenized_dataset,
            work.output,
            sequence_length=work.settings.tokenizer.sequence_length,
            name=model_name(work.experiment),
            provenance={
                "experiment": work.experiment,
                "upstream versions": {name: manifest.content_hash for name, manifest in work.upstream.items()},
                "configuration": work.config,
            },
            log=work.log,
        )
        rows = as_rows(found.certificates)
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    **{
                        f"{row['engine'].split()[0]} {row['precision']}": f"{row['log_probability_difference']:.1g} "
                        "nats at most"
                        for row in rows
                    }
                ),
                "picture": ui_metadata.bars(
                    "bytes of the exported model",
                    {
                        folder.name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                        for folder in sorted(work.output.iterdir())
                        if folder.is_dir()
                    },
                    "bytes",
                ),
                # As many columns as the page has room for; the manifest has all.
                "certificates": ui_metadata.table(
                    [
                        {
                            "file": row["file"],
                            "engine": row["engine"],
                            # A page may break a line at a hyphen, but not at a non-breaking one.
                            "nats": f"{row['log_probability_difference']:.1e}".replace("-", "\u2011"),
                        }
                        for row in rows
                    ]
                ),
                "left_out": "; ".join(found.left_out) or "nothing",
            },
            [checks.is_the_same_model(rows, found.differences)],
            certificates=[asdict(certificate) for certificate in found.certificates],
        )
