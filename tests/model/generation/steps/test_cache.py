"""Slots keep what was computed until another sequence needs them."""

import numpy as np
import psutil
import pytest
import torch

from model.generation.slots import MIN_REUSED_TOKENS, SlotTable
from model.generation.steps.cache import KeyValueCache, bytes_per_token
from model.generation.steps.reference import ReferenceStep
from tests.support.tiny import tiny_model, tiny_tokenizer

LONG = np.arange(2, 42)


@pytest.fixture
def step() -> ReferenceStep:
    made = ReferenceStep(tiny_model(tiny_tokenizer()), 3)
    for slot in range(3):
        for tensor in (*made.cache.keys, *made.cache.values):
            tensor[slot] = slot + 1
    return made


@pytest.fixture
def cache(step) -> KeyValueCache:
    return step.cache


@pytest.fixture
def table(step) -> SlotTable:
    return SlotTable(step)


def hold(table: SlotTable, slot: int, ids: np.ndarray) -> None:
    table.truncate(slot, 0)
    table.append(slot, ids)
    table.touch(slot)


def test_an_empty_cache_gives_the_lowest_slot(table):
    assert table.take([0, 1, 2], LONG, reuse=True) == (0, 0)


def test_a_free_slot_with_the_same_beginning_is_continued_in_place(table):
    hold(table, 1, LONG)
    assert table.take([0, 1, 2], np.append(LONG[:30], [7, 7]), reuse=True) == (1, 30)
    assert table.length(1) == 30


def test_the_last_token_of_a_prompt_is_always_computed(table):
    hold(table, 0, LONG)
    assert table.take([0], LONG, reuse=True) == (0, len(LONG) - 1)


def test_the_beginning_of_a_slot_in_use_is_copied(cache, table):
    hold(table, 1, LONG)
    assert table.take([0, 2], np.append(LONG, 7), reuse=True) == (0, len(LONG))
    for tensor in (*cache.keys, *cache.values):
        assert (tensor[0, :, : len(LONG)] == 2).all()
        assert (tensor[0, :, len(LONG) :] == 1).all()
    assert table.take([2], np.append(LONG, 8), reuse=True) == (2, len(LONG))


def test_a_long_text_is_not_given_up_for_a_short_common_beginning(table):
    hold(table, 0, LONG)
    prompt = np.append(LONG[:MIN_REUSED_TOKENS], [7, 7])
    assert table.take([0, 1, 2], prompt, reuse=True) == (1, MIN_REUSED_TOKENS)
    assert table.length(0) == len(LONG)


def test_a_common_beginning_that_is_not_worth_it_is_computed_again(table):
    hold(table, 0, LONG)
    assert table.take([1, 2], np.append(LONG[: MIN_REUSED_TOKENS - 1], [7, 7]), reuse=True) == (1, 0)


def test_the_slot_left_longest_ago_is_overwritten_first(table):
    for slot in (1, 2, 0):
        hold(table, slot, LONG + 100 * slot)
    assert table.take([0, 1, 2], LONG + 40, reuse=True) == (1, 0)
    assert table.longest_shared(LONG + 100) == 0
    assert table.longest_shared(LONG + 200) == len(LONG) - 1


def test_without_reuse_a_slot_starts_empty(table):
    hold(table, 0, LONG)
    slot, cached = table.take([0], LONG, reuse=False)
    assert (slot, cached, table.length(0)) == (0, 0, 0)


def test_a_cleared_slot_holds_no_number_of_before(cache, table):
    hold(table, 1, LONG)
    cache.keys[0][1] = torch.nan
    table.clear(1)
    assert table.length(1) == 0
    assert all((tensor[1] == 0).all() for tensor in (*cache.keys, *cache.values))


def test_memory_is_what_is_said_of_a_token(cache):
    config = tiny_model(tiny_tokenizer()).config
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert held == 3 * cache.context_length * bytes_per_token(config, torch.float32)


def test_the_memory_of_a_released_slot_goes_back_and_reads_as_zeros():
    config = tiny_model(tiny_tokenizer(), max_position_embeddings=1 << 15).config
    made = KeyValueCache(config, 2, dtype=torch.float32, device=torch.device("cpu"))
    size = bytes_per_token(config, torch.float32) << 15
    before = psutil.Process().memory_info().rss
    for tensor in (*made.keys, *made.values):
        tensor[:] = 1.0
    filled = psutil.Process().memory_info().rss
    made.release(1)
    released = psutil.Process().memory_info().rss
    assert filled - before > 1.8 * size
    assert filled - released > 0.8 * size
    for tensor in (*made.keys, *made.values):
        assert (tensor[0] == 1).all() and (tensor[1] == 0).all()


def test_kept_texts_give_way_in_the_order_of_their_last_use(table):
    for slot, count in ((2, 30), (0, 20), (1, 10)):
        hold(table, slot, LONG[:count])
    table.free_memory([0, 1, 2], 60)
    assert [table.length(slot) for slot in range(3)] == [20, 10, 30]
    table.free_memory([0, 1, 2], 31)
    assert [table.length(slot) for slot in range(3)] == [20, 10, 0]
    table.free_memory([0, 1], 9)
    assert [table.length(slot) for slot in range(3)] == [0, 0, 0]
