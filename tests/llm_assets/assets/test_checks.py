import json
import math
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_assets.assets import checks
from model.baselines import token_baselines
from model.settings import CorpusSettings, TokenizerSettings
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small corpus with characters of several bytes, and its tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(f"Straße {number} – naïve 東京 {number * number}\n" * 6)
    settings = CorpusSettings(source="files", paths=[str(folder / "text" / "*.txt")], validation_fraction=0.3)
    build_corpus(settings, folder / "corpus")
    tokenizer = TokenizerSettings(vocab_size=300, sequence_length=16)
    build_tokenized_dataset(tokenizer, folder / "corpus", folder / "dataset")
    return folder / "corpus", folder / "dataset"


def shard(corpus: Path, split: str, ids: list[str]) -> None:
    corpus.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": ids}), corpus / f"{split}-00000.parquet")


def test_a_real_corpus_and_its_tokens_pass(data: tuple[Path, Path]) -> None:
    corpus, dataset = data
    assert checks.splits_are_disjoint(corpus).passed
    assert checks.round_trip_is_exact(corpus, dataset, 16).passed


@pytest.mark.parametrize(("train", "validation"), [(["a", "b"], ["b"]), (["a"], []), ([], ["a"])])
def test_a_document_in_both_splits_and_an_empty_split_fail(
    tmp_path: Path, train: list[str], validation: list[str]
) -> None:
    shard(tmp_path, "train", train)
    shard(tmp_path, "validation", validation)
    result = checks.splits_are_disjoint(tmp_path)
    assert not result.passed
    assert result.severity == ERROR


def test_a_validation_split_whose_text_is_in_training_too_is_warned_about_with_the_documents(tmp_path: Path) -> None:
    texts = {
        f"{number}.txt": f"{number} " + " ".join(map(str, range(number, number + 60))) for number in range(0, 900, 90)
    }
    (tmp_path / "text").mkdir()
    for name, text in texts.items():
        (tmp_path / "text" / name).write_text(text)
    settings = CorpusSettings(source="files", paths=[str(tmp_path / "text" / "*.txt")], validation_fraction=0.3)
    build_corpus(settings, tmp_path / "corpus")
    result = checks.splits_share_little_text(tmp_path / "corpus")
    assert result.passed
    (tmp_path / "text" / "all.txt").write_text("\n\n".join(texts.values()).upper())
    build_corpus(settings, tmp_path / "corpus")
    result = checks.splits_share_little_text(tmp_path / "corpus")
    assert not result.passed
    assert result.severity == WARN
    assert result.metadata["validation_documents_mostly_in_training"].value > 0


def test_tokens_of_another_text_fail(data: tuple[Path, Path], tmp_path: Path) -> None:
    _, dataset = data
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"other text {number}\n")
    settings = CorpusSettings(source="files", paths=[str(tmp_path / "text" / "*.txt")], validation_fraction=0.3)
    build_corpus(settings, tmp_path / "corpus")
    assert not checks.round_trip_is_exact(tmp_path / "corpus", dataset, 16).passed


def test_knowing_frequencies_is_better_than_knowing_nothing(data: tuple[Path, Path]) -> None:
    measured = token_baselines(data[1], 16)
    assert 0 < measured.unigram < measured.uniform


@pytest.mark.parametrize(
    ("loss", "bits", "passed", "severity"),
    [
        (2.0, 1.0, True, WARN),
        (2.0, 2.5, False, WARN),
        (2.0, 4.0, False, ERROR),
        (float("nan"), float("nan"), False, ERROR),
        (float("inf"), 1.0, False, ERROR),
    ],
)
def test_a_model_must_beat_the_baselines(
    loss: float, bits: float, passed: bool, severity: dg.AssetCheckSeverity
) -> None:
    result = checks.beats_baselines(loss, bits, uniform=3.0, unigram=2.0)
    assert (result.passed, result.severity) == (passed, severity)
    for name, value in (("loss", loss), ("bits_per_byte", bits)):  # the page plots numbers, and has no infinity
        assert result.metadata[name].value == (value if math.isfinite(value) else str(value))


@pytest.mark.parametrize(
    ("bits", "passed", "severity"),
    [(2.0, True, WARN), (2.03, True, WARN), (2.09, False, WARN), (2.2, False, ERROR), (float("nan"), False, ERROR)],
)
def test_quantization_may_cost_little(bits: float, passed: bool, severity: dg.AssetCheckSeverity) -> None:
    result = checks.keeps_quality(bits, 2.0)
    assert (result.passed, result.severity) == (passed, severity)
    assert result.metadata["bits_per_byte"].value == (bits if math.isfinite(bits) else str(bits))


def test_a_bento_that_is_not_in_the_store_fails(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").touch()
    there = {"tag": "rex:a", "path": str(tmp_path / "model")}
    assert checks.is_in_store(there, there).passed
    assert not checks.is_in_store(None, there).passed
    assert not checks.is_in_store(there | {"path": str(tmp_path / "gone")}, there).passed


def test_every_check_of_an_asset_blocks() -> None:
    specs = [spec for asset in ("corpus", "packaged_bento") for spec in checks.specs(asset)]
    assert [spec.name for spec in specs] == ["splits_are_disjoint", "splits_share_little_text", "is_in_store"]
    assert all(spec.blocking for spec in specs)


def test_a_training_with_warnings_fails_its_check_without_blocking_and_what_it_made_is_known(tmp_path: Path) -> None:
    lines = ["the gradient norm is exactly 0 at step 10 and 3 later log lines", "parameters unchanged: a"]
    result = checks.trains_soundly(lines)
    assert (result.passed, result.severity) == (False, WARN)
    assert result.metadata["found"].value == "; ".join(lines)
    assert checks.trains_soundly([]).passed
    (tmp_path / "summary.json").write_text(json.dumps({"warnings": lines}))
    assert checks.training_warnings(tmp_path) == lines
    (tmp_path / "summary.json").write_text("{}")
    assert checks.training_warnings(tmp_path) == []


ROW = {"engine": "transformers", "file": "hf", "log_probability_difference": 1e-6}


@pytest.mark.parametrize(
    ("rows", "differences", "passed"),
    [([ROW], [], True), ([ROW], ["transformers, hf: a log-probability differs"], False), ([], [], False)],
    ids=["the same", "a difference", "no engine"],
)
def test_an_export_passes_only_where_an_engine_ran_it_and_found_no_difference(rows, differences, passed) -> None:
    assert checks.is_the_same_model(rows, differences).passed == passed


REPORT = {"kv_cache_speedup": 3.2, "kv_cache_tokens": 256}
WORSE = {"difference": 0.03, "low": 0.01, "high": 0.05, "champion": "4", "decision": "not promoted"}


@pytest.mark.parametrize(
    ("report", "decision", "export_agrees", "says"),
    [
        (REPORT, {}, None, "no objection"),
        (REPORT, {**WORSE, "difference": -0.03, "low": -0.05, "high": -0.01}, True, "no objection"),
        (REPORT, {**WORSE, "difference": 0.001, "low": -0.02}, True, "no objection"),
        (
            REPORT,
            WORSE,
            True,
            "+0.0300 bits per byte against the champion, version 4: expected no significant increase",
        ),
        ({**REPORT, "kv_cache_speedup": 0.9}, {}, None, "0.90 times as fast: expected more than 1"),
        (REPORT, {}, False, "the exported model differs from the checkpoint"),
    ],
    ids=["alone", "better", "worse by chance", "worse", "a slow cache", "another export"],
)
def test_a_release_is_judged_by_its_cache_its_champion_and_its_export(
    report: dict, decision: dict, export_agrees: bool | None, says: str
) -> None:
    check = checks.is_fit_for_release(report, decision, export_agrees)
    assert check.passed == (says == "no objection")
    assert says in check.metadata["found"].value
    assert check.severity == dg.AssetCheckSeverity.WARN
