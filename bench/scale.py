"""What more workers give: a corpus and its tokens on Ray, and the growth of a corpus that is made on the fly.

Corpus and tokenizing: one thread against Ray's tasks on `--workers` cores, and the seconds that Ray adds; both write
the same bytes, or this ends with an error. Growth: both stages of three sizes of a corpus of made documents, in tasks;
time and memory of all processes; from 1 GB on, also extrapolated to 1 TB on 1,000 cores. Run: `python -m bench.scale`
(needs `make cluster`), some minutes on two cores; `--grown 10000` takes half an hour and 20 GB of disk.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.tokenizing import python_source
from model.errors import PipelineError, ends_in_one_line
from model.settings import (
    ComputeSettings,
    CorpusSettings,
    TokenizerSettings,
)
from model.system.tasks import Apply, tasks
from model.text.corpus import build_corpus, read_documents, read_summary
from model.text.parts import in_tasks
from model.text.shards import by_shards, encode_by_shards
from model.text.tokens import build_tokenized_dataset

VOCABULARY, LENGTH = 8192, 256
STAGES = ("corpus", "tokens")
TERABYTE, CORES = 1e12, 1000
EXTRAPOLATED = 1e9
"""Bytes of text from which the figures are extrapolated."""
RUN_LINES, FILE_DOCUMENTS = 16, 8192
"""Lines in a row of a document that is made, and documents of a file."""
MAX_FILE_BYTES = 1 << 19
"""A shard holds at least one file of the standard library."""


def import_encoder(number: int) -> str:
    """Make a worker import what its tasks use."""
    import model.text.parts
    import model.text.shards

    return f"{model.text.parts.__name__} {model.text.shards.__name__}"


def tokenizing(corpus: Path, tokens: Path, workers: int) -> dict[str, float]:
    """Seconds to encode the train split with one worker in this process and with `workers` of Ray, and Ray's own."""
    settings = TokenizerSettings(vocab_size=VOCABULARY, sequence_length=LENGTH)
    folder = [corpus, "train", tokens, VOCABULARY, np.uint16, settings]
    seconds = {}
    started = time.perf_counter()
    encode_by_shards(*folder, apply=map, scratch_dir=tokens)  # type: ignore[arg-type]
    seconds["one worker"] = time.perf_counter() - started
    one = (tokens / "train.bin").read_bytes()
    compute = ComputeSettings(engine="ray", processes=workers)
    started = time.perf_counter()
    with tasks(compute) as apply:
        assert apply
        seconds["start of Ray"] = time.perf_counter() - started
        started = time.perf_counter()
        list(apply(import_encoder, range(workers)))
        seconds["start of its workers"] = time.perf_counter() - started
        started = time.perf_counter()
        encode_by_shards(*folder, apply=apply, scratch_dir=tokens)  # type: ignore[arg-type]
        seconds[f"{workers} workers"] = time.perf_counter() - started
        started = time.perf_counter()
    seconds["end of Ray"] = time.perf_counter() - started
    if (tokens / "train.bin").read_bytes() != one:
        raise PipelineError(f"{tokens / 'train.bin'} of {workers} workers differs from that of one: expected the same")
    return seconds


def building(settings: CorpusSettings, size: int, scratch: Path, workers: int) -> dict[str, float]:
    """Seconds to build a corpus of `size` bytes in this process and in tasks of `workers`, without the start of Ray."""
    seconds, compute = {}, ComputeSettings(engine="ray", processes=workers)
    started = time.perf_counter()
    build_corpus(settings, scratch / "one")
    seconds["one worker"] = time.perf_counter() - started
    with tasks(compute) as apply:
        assert apply
        list(apply(import_encoder, range(workers)))
        started = time.perf_counter()
        build_corpus(settings, scratch / "many", write=in_tasks(apply, scratch / "parts", size // 16))
        seconds[f"{workers} workers"] = time.perf_counter() - started
    for one in sorted((scratch / "one").iterdir()):
        if (scratch / "many" / one.name).read_bytes() != one.read_bytes():
            raise PipelineError(f"{one.name} of {workers} workers differs from that of one: expected the same")
    return seconds


def write_documents(lines: Sequence[str], folder: Path, size: int) -> None:
    """Parquet files of about `size` bytes in documents that all differ: runs of lines in random order."""
    random_, written = random.Random(size), 0
    folder.mkdir()
    while written < size:
        texts: list[str] = []
        while written < size and len(texts) < FILE_DOCUMENTS:
            starts = random_.choices(range(len(lines) - RUN_LINES), k=random_.randint(2, 16))
            texts.append("".join(line for start in starts for line in lines[start : start + RUN_LINES]))
            written += len(texts[-1].encode())
        pq.write_table(pa.table({"text": texts}), folder / f"{written:015}.parquet", compression="zstd")


class Clocked:
    """Runs tasks and counts the seconds that they take; the rest of a stage is the work of one process."""

    def __init__(self, apply: Apply) -> None:
        self._apply, self.seconds = apply, 0.0

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results, in order."""
        results = iter(self._apply(function, items))
        while True:
            started = time.perf_counter()
            result = next(results, self)
            self.seconds += time.perf_counter() - started
            if result is self:
                return
            yield result


@contextmanager
def memory_mb() -> Iterator[list[float]]:
    """Memory of this process and all below it, twice a second, shared pages divided among those that share them."""
    found: list[float] = []
    ended, this = threading.Event(), psutil.Process()

    def sample() -> None:
        is_over = False
        while not is_over:
            held = 0
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error):
                    held += process.memory_full_info().pss
            found.append(held / 1e6)
            is_over = ended.wait(0.5)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def growth(lines: Sequence[str], megabytes: float, scratch: Path, workers: int) -> list[dict[str, float]]:
    """Both stages of corpora of a tenth, three tenths and all of `megabytes`, written just before and deleted after.

    Bytes of text, and for each stage seconds, those without a task running, and the largest memory (MB) of all
    processes.
    """
    points: list[dict[str, float]] = []
    source, corpus, tokens = (scratch / name for name in ("made", "grown", "grown-tokens"))
    settings = CorpusSettings(source="files", paths=[str(source / "*.parquet")])
    tokenizer = TokenizerSettings(vocab_size=VOCABULARY, sequence_length=LENGTH, training_bytes=4 << 20)
    stages: dict[str, Callable[[Apply], object]] = {
        "corpus": lambda apply: build_corpus(settings, corpus, write=in_tasks(apply, scratch / "parts")),
        "tokens": lambda apply: build_tokenized_dataset(
            tokenizer, corpus, tokens, encode=by_shards(apply, scratch / "encoded")
        ),
    }
    with tasks(ComputeSettings(engine="ray", processes=workers)) as apply:
        assert apply
        list(apply(import_encoder, range(workers)))
        for share in (0.1, 0.3, 1.0):
            write_documents(lines, source, int(share * megabytes * 1e6))
            point: dict[str, float] = {}
            for stage, build in stages.items():
                clocked = Clocked(apply)
                started = time.perf_counter()
                with memory_mb() as held_mb:
                    build(clocked)
                seconds = time.perf_counter() - started
                point |= {f"{stage}_s": seconds, f"{stage}_alone_s": seconds - clocked.seconds}
                point[f"{stage}_mb"] = max(held_mb)
            points.append({"bytes": read_summary(corpus).bytes, **point})
            print(describe(points[-1]), flush=True)
            for folder in (source, corpus, tokens, scratch / "parts", scratch / "encoded"):
                shutil.rmtree(folder, ignore_errors=True)
    return points


def describe(point: dict[str, float]) -> str:
    """A line of `growth`."""
    stages = [
        f"{stage} {point[f'{stage}_s']:,.1f} s, {point[f'{stage}_alone_s']:,.1f} s of it without tasks, "
        f"{point[f'{stage}_mb']:,.0f} MB at most"
        for stage in STAGES
    ]
    return f"grown to {point['bytes'] / 1e6:,.0f} MB: {'; '.join(stages)}"


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one line for each result and the record as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24, help="of the corpus that is tokenized; default 24")
    parser.add_argument(
        "--grown", type=float, default=100, help="megabytes of the largest corpus of made documents; default 100"
    )
    parser.add_argument("--workers", type=int, default=2, help="of Ray; default 2")
    given = parser.parse_args(argv)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        source = python_source(scratch / "source", given.megabytes)
        shards = CorpusSettings(
            source="files",
            paths=[str(scratch / "texts" / "*.txt")],
            shard_bytes=max(source.bytes // 16, MAX_FILE_BYTES),
            split_by="position",
        )
        (scratch / "texts").mkdir()
        for number, text in enumerate(read_documents(scratch / "source", "train")):
            (scratch / "texts" / f"{number:06}.txt").write_bytes(text.encode())
        corpus = build_corpus(shards, scratch / "corpus")
        settings = TokenizerSettings(vocab_size=VOCABULARY, sequence_length=LENGTH, training_bytes=4 << 20)
        build_tokenized_dataset(settings, scratch / "corpus", scratch / "tokens")
        record["corpus"] = building(shards, source.bytes, scratch, given.workers)
        for name, seconds in record["corpus"].items():
            print(f"corpus, {name}: {seconds:,.1f}", flush=True)
        record["tokenizing"] = tokenizing(scratch / "corpus", scratch / "tokens", given.workers)
        record["tokenizing"]["bytes"] = corpus.train_bytes
        for name, seconds in record["tokenizing"].items():
            print(f"tokenizing, {name}: {seconds:,.1f}", flush=True)
        lines = "".join(read_documents(scratch / "corpus", "train")).splitlines(keepends=True)
        record["growth"] = growth(lines, given.grown, scratch, given.workers)
    less, whole = record["growth"][-2:]
    times = TERABYTE / (whole["bytes"] - less["bytes"]) / 60
    # What a smaller corpus takes is mostly the start of each stage.
    for stage in STAGES if whole["bytes"] >= EXTRAPOLATED else ():
        seconds, alone_s = (whole[f"{stage}_{name}"] - less[f"{stage}_{name}"] for name in ("s", "alone_s"))
        tasks_s = (seconds - alone_s) * given.workers / CORES
        print(
            f"{stage} of 1 TB on {CORES:,} such cores: {tasks_s * times:,.0f} minutes of tasks, "
            f"{alone_s * times:,.0f} of one process"
        )
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
