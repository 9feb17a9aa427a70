"""The benchmark report of a model."""

import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from llm_assets.assets import asset_arguments, checks
from llm_assets.registry import model_name
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.evidence import served_model
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import stage
from llm_assets.versions.measurements import export_agrees


@dg.asset(**asset_arguments("benchmark_report"))
@reuses_unchanged()
def benchmark_report(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    trained_checkpoint: Path,
    quantized_model: Path,
    exported_model: Path,
    tokenized_dataset: Path,
) -> Iterator[dg.MaterializeResult]:
    """Quality, speed and memory of both models: in the engine that serves, and plainly with and without KV cache."""
    from bench.report.report import build_report

    upstream = {
        "trained_checkpoint": trained_checkpoint,
        "quantized_model": quantized_model,
        "exported_model": exported_model,
        "tokenized_dataset": tokenized_dataset,
    }
    with stage(context, hydra, mlflow, upstream, exclusive=True) as work:
        report = build_report(
            work.settings,
            trained_checkpoint,
            quantized_model,
            tokenized_dataset,
            work.output,
            exported_dir=exported_model,
            log=work.log,
        )
        found = report["summary"]
        llama_cpp = found.get("llama_cpp_q8_0")
        peer = {"llama.cpp, tokens/s": f"{llama_cpp:,.0f}"} if llama_cpp else {}
        work.tracked.log_artifact(work.output)
        served = served_model(work.settings)
        decision = work.tracked.find_decision(model_name(work.experiment), served, work.upstream[served].content_hash)
        # The UI cannot open pictures next to the report: they get separate entries.
        text = re.sub(r"!\[.*\n\n", "", (work.output / "report.md").read_text())
        yield work.result(
            {
                "summary": ui_metadata.summary(
                    **{
                        "one text, tokens/s": f"{found['decode_tokens_per_second']:,.0f}",
                        "quantized, tokens/s": f"{found['decode_tokens_per_second_quantized']:,.0f}",
                        **peer,
                        "with the KV cache": f"{found['kv_cache_speedup']:.2f} times",
                        f"bits/byte, {report['quality']['windows']} windows": f"{found['bits_per_byte']:.4f}",
                    },
                ),
                "picture": ui_metadata.bars(
                    "tokens per second, one text",
                    {
                        "full precision": found["decode_tokens_per_second"],
                        "quantized": found["decode_tokens_per_second_quantized"],
                        **({"llama.cpp Q8_0": llama_cpp} if llama_cpp else {}),
                        "PyTorch loop": found["loop_tokens_per_second"],
                    },
                    " tokens/s",
                ),
                **ui_metadata.numbers(found),
                "report": dg.MetadataValue.md(text[: ui_metadata.TEXT_CHARACTERS]),
                "kv_cache": ui_metadata.picture(work.output / "kv_cache.png"),
                "model_benchmark_comparison": ui_metadata.picture(work.output / "model_benchmark_comparison.png"),
            },
            [checks.is_fit_for_release(found, decision, export_agrees(decision))],
        )
