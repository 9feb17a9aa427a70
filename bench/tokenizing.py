"""Tokenizing speed against `datasets.map` with the same Hugging Face tokenizer, and peak memory at two corpus sizes.

Both sides run in turn on Python source of this machine (standard library, then installed packages). Ours reads Parquet
shards, encodes and writes token files; the baseline is `datasets.map(batched=True, num_proc=2)`, which reads and writes
Arrow. The ids of every document must match. Run: `python -m bench.tokenizing`, about five minutes on two cores.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import PipelineError, ends_in_one_line
from model.settings import CorpusSettings, TokenizerSettings
from model.text.corpus import SPLITS, CorpusSummary, build_corpus, read_documents
from model.text.tokenizer import FastEncoder, even_sample, load_tokenizer, train_tokenizer
from model.text.tokens import build_tokenized_dataset, encode_split

MEMORY_TRAINING_BYTES = 8 << 20


def python_source(directory: Path, megabytes: float) -> CorpusSummary:
    """A corpus of up to `megabytes` of Python files: the standard library with its tests, then installed packages."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths = [f"{folder}/**/*.py" for folder in dict.fromkeys(folders)]
    limit = int(megabytes * 1e6)
    settings = CorpusSettings(source="files", paths=paths, max_bytes=limit, split_by="position")
    return build_corpus(settings, directory)


def compare_speed(megabytes: float, rounds: int, vocab_size: int, scratch: Path) -> dict[str, Any]:
    """Seconds of both sides per round, and their ratio.

    Raises PipelineError if the ids of a document differ.
    """
    import datasets

    datasets.disable_progress_bars()
    corpus = python_source(scratch / "corpus", megabytes)
    settings = TokenizerSettings(vocab_size=vocab_size)
    texts = even_sample(read_documents(scratch / "corpus", "train"), corpus.train_bytes, settings.training_bytes)
    train_tokenizer(settings, texts).save_pretrained(scratch / "tokenizer")
    shards = [str(path) for split in SPLITS for path in sorted((scratch / "corpus").glob(f"{split}-*.parquet"))]
    documents = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(scratch / "cache"))
    tokenizer = load_tokenizer(scratch / "tokenizer")

    def ours() -> float:
        started = time.perf_counter()
        both = (text for split in SPLITS for text in read_documents(scratch / "corpus", split))
        encode_split(FastEncoder(tokenizer), both, scratch / "ours", tokenizer.eos_token_id, vocab_size, np.uint16)
        return time.perf_counter() - started

    def theirs() -> tuple[float, Any]:
        started = time.perf_counter()
        mapped = documents.map(
            # split_special_tokens: a special token written out in a document is ordinary text.
            lambda batch: {
                "input_ids": tokenizer(batch["text"], split_special_tokens=True, verbose=False)["input_ids"]
            },
            batched=True,
            num_proc=2,
            remove_columns=documents.column_names,
            load_from_cache_file=False,
        )
        return time.perf_counter() - started, mapped

    result: dict[str, Any] = {"bytes": corpus.bytes, "documents": corpus.documents, "rounds": []}
    for number in range(rounds):
        if number % 2:
            (their_s, mapped), our_s = theirs(), ours()
        else:
            our_s, (their_s, mapped) = ours(), theirs()
        if number == 0:
            result["tokens"] = check_ids(scratch / "ours", mapped)
        result["rounds"].append({"ours_s": our_s, "datasets_map_s": their_s, "ratio": their_s / our_s})
    result["median_ratio"] = statistics.median(row["ratio"] for row in result["rounds"])
    result["median_tokens_per_s"] = result["tokens"] / statistics.median(row["ours_s"] for row in result["rounds"])
    return result


def check_ids(stem: Path, mapped: Any) -> int:
    """Compare the ids of every document and return the number of documents. Raises PipelineError at the first
    difference.
    """
    tokens = np.memmap(stem.with_name(f"{stem.name}.bin"), np.uint16, "r")
    offsets = np.load(stem.with_name(f"{stem.name}.documents.npy"))
    if len(mapped) != len(offsets) - 1:
        raise PipelineError(
            f"{len(offsets) - 1} documents were encoded, datasets.map has {len(mapped)}: expected the same"
        )
    for number, row in enumerate(mapped.with_format("numpy")):
        ids = tokens[offsets[number] : offsets[number + 1] - 1]  # without the end-of-text token
        if not np.array_equal(ids, row["input_ids"]):
            raise PipelineError(f"document {number}: ids differ from the Hugging Face tokenizer's; expected the same")
    return len(tokens)


def measure_memory(megabytes: float) -> dict[str, float]:
    """Peak resident memory of building a corpus and its tokens in a new process, MB, and that of the imports alone."""
    command = [sys.executable, "-m", "bench.tokenizing", "--memory-of", str(megabytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _build_and_report_memory(megabytes: float) -> dict[str, float]:
    imports_mb = _peak_mb()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = python_source(Path(scratch, "corpus"), megabytes)
        settings = TokenizerSettings(vocab_size=8192, training_bytes=MEMORY_TRAINING_BYTES)
        build_tokenized_dataset(settings, Path(scratch, "corpus"), Path(scratch, "tokens"))
    return {"corpus_mb": corpus.bytes / 1e6, "imports_mb": imports_mb, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure includes the parent's size at the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@ends_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; `--json FILE` also writes it."""
    parser = argparse.ArgumentParser(prog="python -m bench.tokenizing", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=32, help="size of the text, MB (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, at most 65536 (default 8192)")
    parser.add_argument(
        "--memory-megabytes",
        type=float,
        nargs="*",
        default=[30, 120],
        help="corpus sizes at which peak memory is measured, MB (default 30 120; none to leave it out)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory-of", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps(_build_and_report_memory(options.memory_of)))
        return 0
    memory = [measure_memory(megabytes) for megabytes in options.memory_megabytes]
    for row in memory:
        print(
            f"peak memory: {row['peak_mb']:.0f} MB for a corpus of {row['corpus_mb']:.0f} MB "
            f"(imports alone {row['imports_mb']:.0f} MB)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        speed = compare_speed(options.megabytes, options.rounds, options.vocab_size, Path(scratch))
    print(f"{speed['documents']:,} documents, {speed['bytes']:,} bytes, {speed['tokens']:,} tokens; ids equal on all")
    for number, row in enumerate(speed["rounds"], 1):
        print(
            f"round {number}: ours {row['ours_s']:.2f} s, datasets.map {row['datasets_map_s']:.2f} s, "
            f"ratio {row['ratio']:.2f}"
        )
    print(f"median ratio {speed['median_ratio']:.2f}, {speed['median_tokens_per_s']:,.0f} tokens/s")
    if options.json:
        options.json.write_text(json.dumps({"memory": memory, "speed": speed}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
