"""What more workers give: a corpus and its tokens on Ray, and the growth of a corpus that is made on the fly.

Corpus and tokenizing: one thread against Ray's tasks on `--workers` cores, and the seconds that Ray adds; both write
the same bytes, or this ends with an error. Growth: shards are generated, encoded and deleted one after the other; time
and memory are noted on the way, and extrapolated to 1 TB. Run: `python -m bench.scale` (needs `make cluster`), some
minutes on two cores.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.tokenizing import python_source
from model.errors import PipelineError, ends_in_one_line
from model.settings import (
    ComputeSettings,
    CorpusSettings,
    TokenizerSettings,
)
from model.system.tasks import tasks
from model.text.corpus import build_corpus, read_documents
from model.text.parts import in_tasks
from model.text.shards import ShardTask, encode_by_shards, encode_shard
from model.text.tokens import build_tokenized_dataset

VOCABULARY, LENGTH = 8192, 256
TERABYTE = 1e12
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


def growth(corpus: Path, tokenizer: Path, megabytes: float, scratch: Path) -> list[dict[str, float]]:
    """Bytes, seconds and peak memory (MB) after each eighth of a corpus of `megabytes`, made shard by shard."""
    documents, random_ = list(read_documents(corpus, "train")), random.Random(0)
    shard, folder = scratch / "shard.parquet", scratch / "shard"
    points: list[dict[str, float]] = []
    done, encoding_s, eighth = 0, 0.0, megabytes * 1e6 / 8
    while len(points) < 8:
        texts = random_.sample(documents, min(len(documents), 500))
        pq.write_table(pa.table({"text": texts}), shard)
        started = time.perf_counter()
        encode_shard(ShardTask(shard, folder, tokenizer, VOCABULARY, "uint16", LENGTH, False))
        encoding_s += time.perf_counter() - started
        shutil.rmtree(folder)
        done += sum(len(text.encode()) for text in texts)
        if done >= eighth * (len(points) + 1):
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            points.append({"bytes": done, "seconds": encoding_s, "peak_mb": peak_mb})
    return points


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one line for each result and the record as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24, help="of the corpus that is tokenized; default 24")
    parser.add_argument("--grown", type=float, default=100, help="megabytes of the corpus made on the fly; default 100")
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
        record["growth"] = growth(scratch / "corpus", scratch / "tokens" / "tokenizer", given.grown, scratch)
    for point in record["growth"]:
        print(f"grown to {point['bytes'] / 1e6:,.0f} MB: {point['seconds']:.1f} s, {point['peak_mb']:,.0f} MB at most")
    last = record["growth"][-1]
    minutes = TERABYTE / (last["bytes"] / last["seconds"]) / 1000 / 60
    print(f"1 TB on 1,000 such cores: {minutes:.1f} minutes of encoding, if reading and the joined file keep up")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
