"""Ways in which a cluster may run tasks; all give the results in the order of the items."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def in_any_order(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    found = {number: function(items[number]) for number in random.Random(0).sample(range(len(items)), len(items))}
    return [found[number] for number in range(len(items))]


def twice_each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """As a cluster that takes a slow host for a lost one."""
    for item in items:
        function(item)
        yield function(item)
