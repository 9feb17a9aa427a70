"""Slots keep what was computed for as long as nobody else needs them."""

import numpy as np
import pytest
import torch

from model.generation.cache import SHORTEST_REUSE, SlotCache, bytes_per_token
from tests.tiny import tiny_model, tiny_tokenizer

LONG = np.arange(2, 42)


@pytest.fixture
def cache() -> SlotCache:
    config = tiny_model(tiny_tokenizer()).config
    made = SlotCache(config, 3, dtype=torch.float32, device=torch.device("cpu"))
    for slot in range(3):
        for tensor in (*made.keys, *made.values):
            tensor[slot] = slot + 1
    return made


def hold(cache: SlotCache, slot: int, ids: np.ndarray) -> None:
    cache.truncate(slot, 0)
    cache.append(slot, ids)
    cache.touch(slot)


def test_an_empty_cache_gives_the_lowest_slot(cache):
    assert cache.take([0, 1, 2], LONG, reuse=True) == (0, 0)


def test_a_free_slot_with_the_same_beginning_is_continued_in_place(cache):
    hold(cache, 1, LONG)
    assert cache.take([0, 1, 2], np.append(LONG[:30], [7, 7]), reuse=True) == (1, 30)
    assert cache.length(1) == 30


def test_the_last_token_of_a_prompt_is_always_computed(cache):
    hold(cache, 0, LONG)
    assert cache.take([0], LONG, reuse=True) == (0, len(LONG) - 1)


def test_the_beginning_of_a_slot_in_use_is_copied(cache):
    hold(cache, 1, LONG)
    assert cache.take([0, 2], np.append(LONG, 7), reuse=True) == (0, len(LONG))
    for tensor in (*cache.keys, *cache.values):
        assert (tensor[0, :, : len(LONG)] == 2).all()
        assert (tensor[0, :, len(LONG) :] == 1).all()
    assert cache.take([2], np.append(LONG, 8), reuse=True) == (2, len(LONG))


def test_a_long_text_is_not_given_up_for_a_short_common_beginning(cache):
    hold(cache, 0, LONG)
    prompt = np.append(LONG[:SHORTEST_REUSE], [7, 7])
    assert cache.take([0, 1, 2], prompt, reuse=True) == (1, SHORTEST_REUSE)
    assert cache.length(0) == len(LONG)


def test_a_common_beginning_that_is_not_worth_it_is_computed_again(cache):
    hold(cache, 0, LONG)
    assert cache.take([1, 2], np.append(LONG[: SHORTEST_REUSE - 1], [7, 7]), reuse=True) == (1, 0)


def test_the_slot_left_longest_ago_is_overwritten_first(cache):
    for slot in (1, 2, 0):
        hold(cache, slot, LONG + 100 * slot)
    assert cache.take([0, 1, 2], LONG + 40, reuse=True) == (1, 0)
    assert cache.longest_shared(LONG + 100) == 0
    assert cache.longest_shared(LONG + 200) == len(LONG) - 1


def test_without_reuse_a_slot_starts_empty(cache):
    hold(cache, 0, LONG)
    slot, cached = cache.take([0], LONG, reuse=False)
    assert (slot, cached, cache.length(0)) == (0, 0, 0)


def test_a_cleared_slot_holds_no_number_of_before(cache):
    hold(cache, 1, LONG)
    cache.keys[0][1] = torch.nan
    cache.clear(1)
    assert cache.length(1) == 0
    assert all((tensor[1] == 0).all() for tensor in (*cache.keys, *cache.values))


def test_memory_is_what_is_said_of_a_token(cache):
    config = tiny_model(tiny_tokenizer()).config
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert held == 3 * cache.context_length * bytes_per_token(config, torch.float32)
