"""Mixtures: which part of a tokenized split is from which source, and how often a training takes its windows.

A corpus of several named sources (`corpus.mixture`) has their documents one source after the other, so a boundary per
source is enough: `{split}.sources.json` holds the names and the token after the last of each. A window belongs to the
source of its first token.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.errors import PipelineError


@dataclass(frozen=True)
class SplitSources:
    """Sources of one split. ends: the token after the last of each source, in the order of `names`."""

    names: tuple[str, ...]
    ends: tuple[int, ...]

    def of_tokens(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index of the source of each of these positions."""
        return np.searchsorted(np.array(self.ends), tokens, side="right")


def write_sources(path: Path, names: Sequence[str], documents: Sequence[int], offsets: npt.NDArray[np.int64]) -> None:
    """Write the boundaries of a split. documents: of each source. offsets: start of each document, and the end."""
    ends = offsets[np.cumsum(documents)].tolist()
    path.write_text(json.dumps({"names": list(names), "ends": ends}) + "\n", encoding="utf-8")


def read_sources(path: Path) -> SplitSources | None:
    """The sources that `write_sources` wrote; None if the dataset is not a mixture."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return SplitSources(tuple(found["names"]), tuple(found["ends"]))


def shares(names: Sequence[str], windows_of_sources: Sequence[int], weights: Mapping[str, float]) -> list[float] | None:
    """Each source's share of the training windows; None without weights: every window is as frequent.

    Raises PipelineError for a name without a source, a missing one, and a source without a window.
    """
    if not weights:
        return None
    if set(weights) != set(names):
        found = ", ".join(names) or "none: the corpus is not a mixture"
        raise PipelineError(
            f"training.mixture_weights names {', '.join(weights)}: expected the sources of corpus.mixture ({found})"
        )
    for name, windows in zip(names, windows_of_sources, strict=True):
        if weights[name] and not windows:
            raise PipelineError(
                f"the source {name!r} of the mixture has no training window: expected at least one; add text to it, or "
                f"set its weight in training.mixture_weights to 0"
            )
    total = sum(weights.values())
    return [weights[name] / total for name in names]


def mixed_order(sources: npt.NDArray[np.int64], fractions: Sequence[float], samples: int, seed: int) -> Iterator[int]:
    """Window indices of a whole training: each source evenly spread over it, in another order in each of its epochs.

    sources: the source of each window, shape (windows,). fractions: of `samples`, by source; they sum to 1. The order
    depends on these arguments alone.
    """
    counts = np.floor(np.array(fractions) * samples).astype(np.int64)
    remainders = np.array(fractions) * samples - counts
    counts[np.argsort(-remainders, kind="stable")[: samples - counts.sum()]] += 1
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
    windows = [_shuffled(np.flatnonzero(sources == source), source, seed) for source in range(len(counts))]
    for owner in owners.tolist():
        yield next(windows[owner])


def _shuffled(windows: npt.NDArray[np.int64], source: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1009 + source)
        yield from windows[torch.randperm(len(windows), generator=generator).numpy()].tolist()
        epoch += 1
