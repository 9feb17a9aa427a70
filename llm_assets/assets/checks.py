"""Asset checks: conditions that an artifact must meet before downstream assets use it.

They run in the step that makes the artifact, on its files, before it is published: a check as a separate step would
cost a process start, and could not keep a bad version from becoming the latest. A blocking check that fails stops the
run and leaves the last good version the latest.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from bench.containers.container import IMAGE_GB, VLLM_GB
from llm_assets.experiments.partitions import experiments
from llm_assets.registry import QUANTIZATION_ERROR, QUANTIZATION_WARNING, SHARED_WARNING, stage_spec
from llm_assets.stage.metadata import table
from model.progress import Log, silent
from model.system.tasks import Apply

ROUND_TRIP_DOCUMENTS = 64


def specs(asset: str) -> Sequence[dg.AssetCheckSpec]:
    """The checks that `asset` reports, all blocking."""
    with warnings.catch_warnings():
        # A preview feature; without partitions, a failed check of one experiment would show for all experiments.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(name, asset=asset, description=description, blocking=True, partitions_def=experiments)
            for name, description in stage_spec(asset).checks.items()
        ]


def _number(value: float) -> float | str:
    """A number that the UI plots, as text where it is none: Dagster's events hold no infinities."""
    return value if math.isfinite(value) else str(value)


def splits_are_disjoint(corpus_dir: Path) -> dg.AssetCheckResult:
    """Compare the ids of the shards; an id is a hash of the document's text."""
    import pyarrow.parquet as pq

    def shards(split: str) -> Iterator[set[str]]:
        for path in sorted(corpus_dir.glob(f"{split}-*.parquet")):
            yield set(pq.read_table(path, columns=["id"])["id"].to_pylist())

    # The small split is kept in memory, the large one is read shard by shard.
    validation = set().union(*shards("validation"))
    train_documents, shared = 0, 0
    for ids in shards("train"):
        train_documents += len(ids)
        shared += len(ids & validation)
    return dg.AssetCheckResult(
        check_name="splits_are_disjoint",
        passed=train_documents > 0 and len(validation) > 0 and shared == 0,
        metadata={
            "train_documents": train_documents,
            "validation_documents": len(validation),
            "documents_in_both": shared,
        },
    )


def splits_share_little_text(
    corpus_dir: Path, log: Log = silent, apply: Apply | None = None, scratch_dir: Path | None = None
) -> dg.AssetCheckResult:
    """Look for validation text in the training split, and for near-duplicates (`model/text/overlap.py`)."""
    from model.text.overlap import find_overlap

    found = find_overlap(corpus_dir, log=log, apply=apply or map, scratch_dir=scratch_dir)
    near = found.near_duplicates
    return dg.AssetCheckResult(
        check_name="splits_share_little_text",
        passed=found.shared <= SHARED_WARNING,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "share_of_validation_text_in_training": found.shared,
            "validation_documents_mostly_in_training": found.contained,
            "validation_documents": found.validation_documents,
            "train_documents": found.train_documents,
            "compared": "all text" if found.is_whole else "the first part of the text",
            "largest_shares": table(found.examples),
            "near_duplicates": "not measured: install the extra `duplicates`" if near is None else near,
            "near_duplicate_examples": table(found.near_examples),
        },
    )


def round_trip_is_exact(corpus_dir: Path, dataset_dir: Path, sequence_length: int) -> dg.AssetCheckResult:
    """Decode the first documents of each split and compare their bytes; of conversations, the bytes of their messages.

    A conversation that was cut has fewer bytes and is not compared.
    """
    from model.text.chat.template import turns_of
    from model.text.corpus import read_documents
    from model.text.tokens import TokenDataset

    compared = different = 0
    for split in ("train", "validation"):
        dataset = TokenDataset(dataset_dir, split, sequence_length)
        documents = read_documents(corpus_dir, split)
        if dataset.responses is not None:
            answered = (turns for turns in map(turns_of, documents) if any(turn.role == "assistant" for turn in turns))
            documents = ("".join(turn.content for turn in turns) for turns in answered)
        starts = dataset.document_offsets
        for start, stop, text in islice(zip(starts[:-1], starts[1:], documents, strict=False), ROUND_TRIP_DOCUMENTS):
            expected, found = text.encode(), dataset.text_bytes(int(start), int(stop))
            if dataset.responses is not None and len(found) < len(expected):
                continue
            compared += 1
            different += found != expected
    return dg.AssetCheckResult(
        check_name="round_trip_is_exact",
        passed=compared > 0 and not different,
        metadata={"documents_compared": compared, "documents_different": different},
    )


def beats_baselines(loss: float, bits_per_byte: float, *, uniform: float, unigram: float) -> dg.AssetCheckResult:
    """Compare a model's bits per byte with those of the baselines of `model/baselines.py` on the same text."""
    sound = math.isfinite(loss) and bits_per_byte < uniform
    return dg.AssetCheckResult(
        check_name="beats_baselines",
        passed=sound and bits_per_byte < unigram,
        severity=dg.AssetCheckSeverity.WARN if sound else dg.AssetCheckSeverity.ERROR,
        metadata={
            "uniform_bits_per_byte": uniform,
            "unigram_bits_per_byte": unigram,
            "loss": _number(loss),
            "bits_per_byte": _number(bits_per_byte),
        },
    )


def trains_soundly(warnings: Sequence[str]) -> dg.AssetCheckResult:
    """Whether no health warning held at the end of the training (`model/training/health.py`)."""
    return dg.AssetCheckResult(
        check_name="trains_soundly",
        passed=not warnings,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"warnings": len(warnings), "found": "; ".join(warnings) or "none"},
    )


def training_warnings(checkpoint_dir: Path) -> list[str]:
    """Health warnings at the end of the training; any warning blocks promotion of this checkpoint's models."""
    return list(json.loads((checkpoint_dir / "summary.json").read_text(encoding="utf-8")).get("warnings", []))


def keeps_quality(bits_per_byte: float, full_bits_per_byte: float) -> dg.AssetCheckResult:
    """Compare the quantized model's bits per byte with full precision's on the same windows."""
    loss = bits_per_byte / full_bits_per_byte - 1
    return dg.AssetCheckResult(
        check_name="keeps_quality",
        passed=loss <= QUANTIZATION_WARNING,
        severity=dg.AssetCheckSeverity.WARN if loss <= QUANTIZATION_ERROR else dg.AssetCheckSeverity.ERROR,
        metadata={
            "relative_loss": _number(loss),
            "bits_per_byte": _number(bits_per_byte),
            "full_bits_per_byte": _number(full_bits_per_byte),
        },
    )


def is_the_same_model(rows: Sequence[Mapping[str, Any]], differences: Sequence[str]) -> dg.AssetCheckResult:
    """Check the certificates of an export: its `rows`, and every difference found."""
    return dg.AssetCheckResult(
        check_name="is_the_same_model",
        passed=bool(rows) and not differences,
        metadata={
            "certificates": len(rows),
            "differences": "\n".join(differences)[:2000] or "none",
            **{f"{row['engine']}, {row['file']}": _number(row["log_probability_difference"]) for row in rows},
        },
    )


def is_fit_for_release(
    report: Mapping[str, Any], decision: Mapping[str, Any], export_agrees: bool | None
) -> dg.AssetCheckResult:
    """Check a release: `report` is the summary of a benchmark report, `decision` the recorded decision on the served
    model (`decision_of`), `export_agrees` the result of the exported model's check, None without an export.
    """
    found = []
    speedup = float(report["kv_cache_speedup"])
    if not speedup > 1:
        found.append(
            f"with the KV cache, {report['kv_cache_tokens']} tokens are generated {speedup:.2f} times as fast: "
            "expected more than 1"
        )
    if decision.get("low", 0) > 0:
        found.append(
            f"{decision['difference']:+.4f} bits per byte against the champion, version {decision['champion']}: "
            "expected no significant increase"
        )
    if export_agrees is False:
        found.append("the exported model differs from the checkpoint: see the checks of exported_model")
    return dg.AssetCheckResult(
        check_name="is_fit_for_release",
        passed=not found,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "found": "; ".join(found) or "no objection",
            "kv_cache_speedup": speedup,
            **({"bits_per_byte_to_champion": decision["difference"]} if "difference" in decision else {}),
            "champion_decision": decision.get("decision", "none"),
            "exported_parity": "not measured" if export_agrees is None else str(export_agrees),
        },
    )


def is_in_store(bento: dict[str, Any] | None, model: dict[str, Any]) -> dg.AssetCheckResult:
    """Check the folders that BentoML named."""
    paths = [Path(found["path"]) for found in (bento, model) if found]
    return dg.AssetCheckResult(
        check_name="is_in_store",
        passed=len(paths) == 2 and all(path.is_dir() and any(path.iterdir()) for path in paths),
        metadata={"bento": bento["tag"] if bento else "none", "model": model["tag"]},
    )


def of_image(asset: str, device: str, engine: str, inside: dict[str, Any], size: int) -> list[dg.AssetCheckResult]:
    """Check the findings in a container of the image (`ContainerEngine.probe`) and the image's size.

    engine: of the service, `rex` or `vllm`.
    """
    limit = IMAGE_GB[device] + (VLLM_GB[device] if engine == "vllm" else 0.0)
    has_cuda = [bool(inside["cuda"]), inside["cuda_packages"] > 0]
    return [
        dg.AssetCheckResult(
            asset_key=asset,
            check_name="fits_the_device",
            passed=has_cuda == [device == "gpu"] * 2 and inside["uid"] != 0,
            metadata=inside,
        ),
        dg.AssetCheckResult(
            asset_key=asset,
            check_name="is_small",
            passed=size <= limit * 1e9,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"image_bytes": size},
        ),
    ]
