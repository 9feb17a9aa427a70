import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.text import overlap
from model.text.overlap import find_overlap, run_hashes
from model.text.shard_writer import SCHEMA


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=generator.randint(2, 9))) for _ in range(count))


def write_split(folder: Path, split: str, texts: list[str]) -> None:
    names = [f"{split}{number}" for number in range(len(texts))]
    columns = [names, texts, names, [split] * len(texts)]
    table = pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)
    pq.write_table(table, folder / f"{split}-00000.parquet", row_group_size=3)


def test_equal_runs_have_equal_hashes_and_other_runs_have_others():
    text = "to be or not to be, that is the question: " * 3 + "whether 'tis nobler in the mind, naïve 東京"
    data = " ".join(text.split()).encode()
    hashes = run_hashes(text, 24, 1)
    by_run = {data[start : start + 24]: int(value) for start, value in enumerate(hashes)}
    assert len(hashes) == len(data) - 23
    assert len(set(by_run.values())) == len(by_run) == len(set(hashes.tolist()))


def test_long_texts_are_hashed_in_pieces_and_case_and_spaces_do_not_count(monkeypatch):
    text = words(900, 1)
    whole = run_hashes(text, 64, 8)
    assert len(whole) == pytest.approx(len(text) / 8, rel=0.2)
    monkeypatch.setattr(overlap, "_PIECE", 100)
    np.testing.assert_array_equal(run_hashes("\n " + text.upper().replace(" ", "\t \n"), 64, 8), whole)


def test_a_document_inside_a_longer_one_of_the_training_split_is_found_with_its_share(tmp_path):
    own, copied, half = words(300, 1), words(300, 2), words(300, 3)
    write_split(tmp_path, "validation", [own, copied, half + words(300, 4)])
    write_split(tmp_path, "train", [words(500, 5), f"{words(200, 6)} {copied.upper()} {words(200, 7)}", half])
    found = find_overlap(tmp_path)
    assert found.contained == 1
    assert [row["document"] for row in found.examples] == ["validation1", "validation2"]
    assert [row["share in training"] for row in found.examples] == pytest.approx([1, 0.5], abs=0.1)
    assert found.shared == pytest.approx(0.5, abs=0.05)
    assert (found.validation_documents, found.train_documents, found.is_whole) == (3, 3, True)


def test_documents_of_either_split_that_nearly_repeat_another_are_counted(tmp_path):
    text = words(400, 1)
    write_split(tmp_path, "validation", [words(400, 2), text])
    write_split(tmp_path, "train", [words(400, 3), text + " and a little more", words(10, 4), words(10, 4) + "."])
    found = find_overlap(tmp_path)
    assert found.near_duplicates == 2
    assert (found.near_examples[0]["document"], found.near_examples[0]["repeats"]) == ("train1", "validation1")
    assert found.near_examples[0]["similarity"] > 0.9


def test_only_so_much_text_is_read_and_the_result_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "TRAIN_BYTES", 5000)
    monkeypatch.setattr(overlap, "NEAR_DOCUMENTS", 0)
    write_split(tmp_path, "validation", [words(20, 1)])
    write_split(tmp_path, "train", [words(300, seed) for seed in range(2, 9)])
    found = find_overlap(tmp_path)
    assert found.train_documents < 7
    assert not found.is_whole
    assert not found.near_duplicates
