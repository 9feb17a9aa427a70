import json
import lzma
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.decode import decode, measure_kv_cache, prompt
from bench.engine.pytorch import GreedyLoop
from bench.report import llama_cpp, speed
from bench.report.engines import llama_cpp_work
from bench.report.markdown import render
from bench.report.memory import Configuration, measure_peaks
from bench.report.plots import running_median
from bench.report.report import build_report, read_export, settings_of, summarize
from bench.report.speed import _middles, _total, common_length, uncached_every
from model.baselines import held_out, token_counts, unigram_bits, xz_bits
from model.build import build_config, build_model
from model.errors import PipelineError
from model.evaluation import evaluate
from model.generation.steps.choose import choose_step
from model.quantization import quantize_checkpoint
from model.settings import (
    BenchmarkSettings,
    CorpusSettings,
    ExperimentSettings,
    QuantizationSettings,
    TokenizerSettings,
)
from model.text.chat.template import MARKS
from model.text.corpus import build_corpus
from model.text.tokenizer import load_tokenizer, train_tokenizer
from model.text.tokens import TokenDataset, build_tokenized_dataset
from model.weights.loading import load_model
from tests.model.training.tiny import TOKENIZER, experiment, make_dataset

BENCHMARK = BenchmarkSettings(
    generated_tokens=[4, 12], prefill_tokens=[8], batch_sizes=[1, 2], batch_tokens=4, repeats=2, quality_windows=3
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    dataset_dir = make_dataset(root)
    config = build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    build_model(config, seed=0).save_pretrained(root / "checkpoint")
    quantize_checkpoint(
        QuantizationSettings(evaluation_windows=2),
        root / "checkpoint",
        dataset_dir,
        root / "int8",
        sequence_length=TOKENIZER.sequence_length,
    )
    return {"checkpoint": root / "checkpoint", "int8": root / "int8", "dataset": dataset_dir, "report": root / "report"}


@pytest.fixture(scope="module")
def settings() -> ExperimentSettings:
    tiny = experiment(sample_prompts=["def ", "```"], sample_tokens=4)
    tiny.benchmark = BENCHMARK
    tiny.serving.device = "cpu"
    return tiny


@pytest.fixture(scope="module")
def report(directories, settings) -> dict:
    return build_report(
        settings, directories["checkpoint"], directories["int8"], directories["dataset"], directories["report"]
    )


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported model of one file, with its certificate."""
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-q8_0.gguf").write_bytes(b"x" * 2_500_000)
    row = {"file": "gguf/model-q8_0.gguf", "engine": "llama.cpp 1", "bits_per_byte": 2.32541, "differences": ["a"]}
    row |= {"bits_per_byte_difference": 8.5e-5, "log_probability_difference": 0.0266}
    found = {"certificates": [row], "left_out": ["hf: not checked"]}
    (tmp_path / "certificates.json").write_text(json.dumps(found))
    return tmp_path


def test_the_exported_model_is_listed_with_its_certificates(report, exported):
    export = read_export(exported)
    assert export["certificates"][0]["bytes"] == 2_500_000
    assert report["export"] is None and "## In other engines" not in render(report)
    page = render({**report, "export": export})
    assert "| `gguf/model-q8_0.gguf` | llama.cpp 1 | 2.5 | 2.3254 | 9e-05 | 0.03 | 1 |" in page
    assert "Left out: hf: not checked." in page
    (exported / "certificates.json").unlink()
    with pytest.raises(PipelineError, match=r"no certificates\.json in .*: expected an exported model"):
        read_export(exported)


@pytest.fixture(scope="module")
def dataset(directories) -> TokenDataset:
    return TokenDataset(directories["dataset"], "validation", TOKENIZER.sequence_length)


def test_the_four_files_are_written_and_the_json_is_what_is_returned(report, directories):
    names = {path.name for path in directories["report"].iterdir()}
    assert names == {"report.json", "report.md", "kv_cache.png", "model_benchmark_comparison.png"}
    assert json.loads((directories["report"] / "report.json").read_text()) == report
    for picture in directories["report"].glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_configuration_is_timed_in_every_round(report):
    decoded = {(row["model"], row["cache"], row["tokens"]): row["repeats"] for row in report["decode"]}
    assert decoded == {
        ("full precision", True, 4): 2,
        ("full precision", True, 12): 2,
        ("full precision", False, 4): 2,
        ("full precision", False, 12): 2,
        ("int8", True, 4): 2,
        ("int8", True, 12): 2,
        ("int8", False, 4): 2,
    }
    assert {(row["model"], row["batch_size"]) for row in report["batch"]} == {
        ("full precision", 1),
        ("full precision", 2),
    }
    assert {(row["model"], row["sequences"], row["tokens"]) for row in ours(report)} == {
        (model, size, 4) for model in ("full precision", "int8") for size in (1, 2)
    }
    assert {(row["model"], row["tokens"]) for row in report["prefill"]} == {("full precision", 8), ("int8", 8)}
    assert len(report["peers"]) == 3
    for row in report["engines"] + report["decode"] + report["batch"] + report["prefill"] + report["peers"]:
        assert len(row["rounds_s"]) == row["repeats"]
        assert all(seconds > 0 for seconds in row["rounds_s"])


def ours(report: dict) -> list[dict]:
    return [row for row in report["engines"] if row["engine"] == "engine"]


def test_the_headline_is_the_speed_of_the_engine_that_serves(report, directories):
    summary = report["summary"]
    speeds = {(row["model"], row["sequences"]): row["tokens_per_second"] for row in ours(report)}
    assert summary["decode_tokens_per_second"] == speeds["full precision", 1]
    assert summary["decode_tokens_per_second_quantized"] == speeds["int8", 1]
    assert summary["batch_tokens_per_second"] == max(speeds["full precision", size] for size in (1, 2))
    assert summary["quantized_speedup"] == speeds["int8", 1] / speeds["full precision", 1]
    with_cache = next(row for row in report["decode"] if row["cache"] and row["tokens"] == 4)
    assert summary["loop_tokens_per_second"] == with_cache["tokens_per_second"]
    assert report["step"] == choose_step(load_model(directories["checkpoint"])).name


def test_without_llama_cpp_the_page_says_how_to_add_it(report, directories, monkeypatch):
    model, tokenizer = load_model(directories["checkpoint"]), load_tokenizer(directories["dataset"] / "tokenizer")
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    reason = llama_cpp.reason_to_leave_out(model, tokenizer)
    assert "pip install llama-cpp-python" in reason
    assert f"llama.cpp is left out: {reason}." in render({**report, "llama_cpp_left_out": reason})
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    assert llama_cpp.reason_to_leave_out(model, tokenizer) == ""
    characters = TokenizerSettings(kind="char", sequence_length=64)
    assert "has no such tokenizer" in llama_cpp.reason_to_leave_out(model, train_tokenizer(characters, ["abc"]))


def test_llama_cpp_stands_beside_the_engine(report):
    """With its rows, as a machine that has it would give them."""
    rows = [
        {**row, "engine": "llama.cpp", "model": kind, "tokens_per_second": rate * row["sequences"]}
        for kind, rate in (("Q8_0", 123.0), ("F32", 45.0))
        for row in ours(report)
        if row["model"] == "int8"
    ]
    found = {**report, "engines": [*ours(report), *rows], "llama_cpp_left_out": ""}
    summary = summarize(found)
    assert summary["llama_cpp_q8_0"] == 123
    assert summary["llama_cpp_f32_batch"] == 90
    page = render({**found, "summary": summary})
    assert "llama.cpp (F32) 45 and 90, (Q8_0) 123 and 246" in page
    assert "| Q8_0, llama.cpp | 2 | 4 | 246 |" in page and "at its best setting" in page


@pytest.mark.processes
@pytest.mark.slow
def test_llama_cpp_that_fails_is_left_out_with_its_reason(directories, monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('ggml.c:1: GGML_ASSERT(is_right) failed')")
    monkeypatch.syspath_prepend(tmp_path)
    model, tokenizer = load_model(directories["checkpoint"]), directories["dataset"] / "tokenizer"
    with ExitStack() as stack:
        found = llama_cpp_work(stack, model, directories["checkpoint"], tokenizer, [(1, 4)], 1)
    assert found == ([], "llama.cpp ended: ggml.c:1: GGML_ASSERT(is_right) failed")
    with llama_cpp.LlamaCppProcess.running(directories["checkpoint"], tokenizer, 1) as process:
        process._process.wait()
        with pytest.raises(PipelineError, match=r"llama.cpp ended: .*GGML_ASSERT"):
            process.decode("Q8_0", 1, 4)


@pytest.mark.parametrize("answered", [0, 1, 3])
def test_a_report_goes_on_without_llama_cpp_that_ends_between_two_timings(directories, monkeypatch, answered):
    speeds = [7.0] * answered

    def decode() -> float:
        if not speeds:
            raise PipelineError("llama.cpp ended: exit status -9")
        return speeds.pop()

    work = [(("engines", "llama.cpp", kind, 1, 4), 4, decode) for kind in llama_cpp.KINDS]
    monkeypatch.setattr(speed, "llama_cpp_work", lambda *_: (work, ""))
    models = {"full precision": load_model(directories["checkpoint"])}
    found = speed.measure_speed(models, BENCHMARK, directories["checkpoint"], directories["dataset"] / "tokenizer", 1)
    assert found["llama_cpp_left_out"] == "llama.cpp ended: exit status -9"
    assert {row["engine"] for row in found["engines"]} == {"engine"}
    assert all(len(row["rounds_s"]) == 2 for row in found["engines"])


def test_the_process_answers_each_line_with_a_speed(directories, monkeypatch, capsys):
    """Another contender stands for llama.cpp, which is compiled for minutes."""
    monkeypatch.setattr(llama_cpp, "KINDS", {"Q8_0": lambda model, tokenizer: GreedyLoop(model)})
    tokenizer = directories["dataset"] / "tokenizer"
    monkeypatch.setattr("sys.argv", ["-", str(directories["checkpoint"]), str(tokenizer), "1"])
    monkeypatch.setattr("sys.stdin", ['["Q8_0", 1, 12]\n', '["Q8_0", 2, 4]\n'])
    threads = torch.get_num_threads()
    llama_cpp.main()
    torch.set_num_threads(threads)
    first, second = map(float, capsys.readouterr().out.split())
    assert first > 0 and second > 0


@pytest.mark.processes
@pytest.mark.skipif(not llama_cpp.installed(), reason="no llama.cpp: pip install llama-cpp-python")
def test_llama_cpp_runs_each_workload_in_its_process(directories):
    model, tokenizer = load_model(directories["checkpoint"]), directories["dataset"] / "tokenizer"
    with ExitStack() as stack:
        work, reason = llama_cpp_work(stack, model, directories["checkpoint"], tokenizer, [(1, 12), (2, 4)], 1)
        assert not reason
        assert [key for key, _, _ in work] == [
            ("engines", "llama.cpp", kind, streams, tokens)
            for kind in ("Q8_0", "F32")
            for streams, tokens in ((1, 12), (2, 4))
        ]
        assert all(run() > 0 for _, _, run in work)


def test_speeds_follow_from_the_raw_rounds(report):
    row = next(row for row in report["batch"] if row["batch_size"] == 2)
    median = sum(row["rounds_s"]) / 2
    assert row["tokens_per_second"] == pytest.approx(2 * 4 / median, rel=1e-3)
    assert row["ms_per_token"] == pytest.approx(1000 * median / 4, rel=1e-3)
    latency = next(row for row in report["latency"] if row["model"] == "full precision" and row["cache"])
    long = next(r for r in report["decode"] if (r["model"], r["cache"], r["tokens"]) == ("full precision", True, 12))
    assert [sum(run) / 1000 for run in latency["rounds_ms"]] == pytest.approx(long["rounds_s"], rel=1e-2)


def test_without_a_cache_each_timed_position_stands_for_its_block():
    settings = BenchmarkSettings(generated_tokens=[16, 41])
    assert uncached_every(settings) == 4
    assert _middles(41, 4) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 41]
    assert _middles(3, 1) == [1, 2, 3]
    seconds = [float(position) for position in _middles(40, 4)]
    assert _total(seconds, 40, 4) == pytest.approx(sum(range(1, 41)), rel=0.03)
    assert _total(seconds, 6, 4) == 4 * 2 + 2 * 6


def test_a_report_says_how_many_positions_were_timed(report, directories):
    latency = {(row["model"], row["cache"]): row["positions"] for row in report["latency"]}
    assert latency["full precision", False] == latency["full precision", True] == list(range(1, 13))
    assert "one of 1 positions is timed" in (directories["report"] / "report.md").read_text()


def test_the_summary_is_flat_and_finite(report):
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in report["summary"].values())
    assert report["summary"]["kv_cache_tokens"] == 12
    assert report["summary"]["decode_tokens"] == 4
    assert report["summary"]["weights_bytes"] > report["summary"]["weights_bytes_quantized"]


def test_quality_is_that_of_the_evaluation(report, directories, dataset):
    expected = evaluate(load_model(directories["checkpoint"]), dataset, max_windows=3)
    assert report["quality"]["models"]["full precision"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert report["quality"]["tokens"] == expected.tokens
    assert report["quality"]["baselines"]["uniform"] == pytest.approx(expected.tokens * math.log2(300) / expected.bytes)


def test_the_page_names_every_number_that_people_look_for(report, directories):
    page = (directories["report"] / "report.md").read_text()
    for text in (
        f"{report['summary']['bits_per_byte']:.3f}",
        f"{report['summary']['kv_cache_speedup']:.1f} times as fast",
        "kv_cache.png",
        "model_benchmark_comparison.png",
        "xz -9e",
        report["hardware"]["torch"],
        "python -m bench.report",
    ):
        assert text in page
    assert str(directories["checkpoint"].parent) not in page + (directories["report"] / "report.json").read_text()


def test_a_sample_with_backticks_cannot_close_its_fence(report, directories):
    assert "````text\n```" in (directories["report"] / "report.md").read_text()


def test_each_memory_peak_covers_the_imports_and_the_model(report):
    assert {(row["model"], row["cache"]) for row in report["memory"]} == {
        (model, cache) for model in ("full precision", "int8") for cache in (True, False)
    }
    for row in report["memory"]:
        assert row["peak_bytes"] > row["baseline_bytes"] > 50_000_000


@pytest.mark.processes
def test_a_child_that_fails_says_why(tmp_path):
    with pytest.raises(PipelineError, match=r"measuring peak memory failed: .*config.json is missing"):
        measure_peaks([Configuration("x", str(tmp_path), True, 4, "cpu", 1)])


@pytest.mark.processes
def test_a_length_beyond_the_context_is_refused(directories, settings, tmp_path):
    shorter = experiment()
    shorter.model.max_position_embeddings = 1024
    shorter.serving.device = "cpu"
    shorter.benchmark = BenchmarkSettings(generated_tokens=[4, 65], prefill_tokens=[8])
    with pytest.raises(PipelineError, match=r"benchmark.generated_tokens is 65: expected at most .* \(64\)"):
        build_report(shorter, directories["checkpoint"], directories["int8"], directories["dataset"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_artifact_directories_are_enough_for_the_command(directories):
    options = type("Options", (), {**vars(BENCHMARK), "name": "x", "device": "cpu"})
    settings = settings_of(directories["checkpoint"], directories["dataset"], options)
    assert settings.benchmark == BENCHMARK
    assert settings.tokenizer.sequence_length == TOKENIZER.sequence_length


def test_the_cache_changes_the_speed_and_not_the_tokens(directories):
    model = load_model(directories["checkpoint"])
    with_cache, seconds = decode(model, prompt(model, 3, batch=2), 10, use_cache=True)
    without_cache, _ = decode(model, prompt(model, 3, batch=2), 10, use_cache=False)
    generated = model.generate(
        prompt(model, 3, batch=2), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert len(seconds) == 10
    assert torch.equal(with_cache, without_cache)
    assert torch.equal(with_cache, generated[:, 3:])


def test_the_kv_cache_measurement_keeps_its_rounds(directories):
    result = measure_kv_cache(directories["checkpoint"], 6, 2)
    assert result["same_tokens"]
    assert len(result["rounds"]["with_cache_s"]) == len(result["rounds"]["without_cache_s"]) == 2
    with pytest.raises(PipelineError, match="--tokens is 65"):
        measure_kv_cache(directories["checkpoint"], 65, 1)


def test_the_baselines_see_exactly_the_text_that_the_models_predict(dataset):
    model = build_model(build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1), 0)
    for windows in (1, 3, len(dataset), len(dataset) + 1):
        ids_T, text = held_out(dataset, windows)
        scored = evaluate(model, dataset, max_windows=windows)
        assert (len(ids_T), len(text)) == (scored.tokens, scored.bytes)


def test_of_conversations_the_baselines_see_the_responses(tmp_path):
    build_corpus(CorpusSettings(source="docstrings", max_bytes=20_000, split_by="position"), tmp_path / "corpus")
    tokenizer = TokenizerSettings(vocab_size=300, sequence_length=64, chat=True)
    build_tokenized_dataset(tokenizer, tmp_path / "corpus", tmp_path / "dataset")
    dataset = TokenDataset(tmp_path / "dataset", "validation", 64)
    model = build_model(build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1), 0)
    for windows in (2, len(dataset) + 1):
        ids_T, text = held_out(dataset, windows)
        scored = evaluate(model, dataset, max_windows=windows)
        assert (len(ids_T), len(text)) == (scored.tokens, scored.bytes)
        assert MARKS["user"].encode() not in text


def test_unigram_bits_are_those_computed_by_hand():
    counts_V = token_counts(np.array([0, 0, 0, 2], dtype=np.uint16), 3)
    assert counts_V.tolist() == [3, 0, 1]
    expected = -math.log2(4 / 7) - math.log2(1 / 7) - math.log2(2 / 7)
    assert unigram_bits(counts_V, np.array([0, 1, 2])) == pytest.approx(expected)


def test_xz_bits_are_those_of_a_file_that_decompresses():
    text = b"abc" * 1000
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert lzma.decompress(compressed) == text
    assert xz_bits(text) == 8 * len(compressed)


def test_configurations_are_compared_at_the_longest_length_but_one():
    assert common_length(BenchmarkSettings(generated_tokens=[1023, 64, 256])) == 256
    assert common_length(BenchmarkSettings(generated_tokens=[64])) == 64


def test_a_running_median_drops_a_spike_and_keeps_the_length():
    assert running_median([1.0, 1.0, 9.0, 1.0, 1.0], 3) == [1.0] * 5
