"""The paged KV cache of the graphs step."""

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.generation.steps.graphs.pages import PAGE, PagedCache


def make_cache(slots: int = 3, tokens: int = 6 * PAGE, context: int = 4 * PAGE) -> PagedCache:
    return PagedCache(
        1, 1, 4, slots=slots, context_length=context, tokens=tokens, dtype=torch.float32, device=torch.device("cpu")
    )


def test_pages_are_taken_as_a_text_grows_shared_and_given_back():
    cache = make_cache()
    cache.hold(0, 0, PAGE + 1)
    assert cache.used_pages == 2
    cache.hold(0, PAGE + 1, 2 * PAGE)
    assert cache.used_pages == 2
    cache.data[:, :, int(cache._pages[0, 1])] = 7.0
    cache.share(0, 1, PAGE + 3)
    assert cache.used_pages == 2 and (cache._pages[0, :2] == cache._pages[1, :2]).all()
    # Who writes to a shared page has a copy first.
    cache.hold(1, PAGE + 3, PAGE + 4)
    assert cache.used_pages == 3 and cache._pages[0, 1] != cache._pages[1, 1]
    assert (cache.data[:, :, int(cache._pages[1, 1])] == 7.0).all()
    cache.data[:, :, int(cache._pages[0, 0])] = 5.0
    cache.hold(0, 10, 11)
    assert cache.used_pages == 4 and cache._pages[0, 0] != cache._pages[1, 0]
    assert (cache.data[:, :, int(cache._pages[0, 0])] == 5.0).all()
    cache.upload(torch.empty_like(cache.table))
    assert np.array_equal(cache.table.numpy(), cache._pages)
    cache.truncate(0, 0)
    cache.truncate(1, 1)
    assert cache.used_pages == 1
    cache.truncate(1, 0)
    assert cache.used_pages == 0


def test_a_full_cache_is_one_line():
    cache = make_cache()
    cache.hold(0, 0, 4 * PAGE)
    cache.hold(1, 0, 2 * PAGE)
    with pytest.raises(PipelineError, match="the KV cache has no free page: all 6 are in use"):
        cache.hold(2, 0, 1)
