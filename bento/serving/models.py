"""The model that serves, and those that still finish what they began when another took over.

A request holds the model that it began with until its last byte, tokenizer and all: `hold` counts it, `serve` swaps the
pointer for those that come later, and nobody else looks at a model's engine twice.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from model.generation.requests import EngineStats

if TYPE_CHECKING:
    from model.generation.engine import Engine

NOTHING_DONE = EngineStats(*[0] * len(fields(EngineStats)))


@dataclass(eq=False)
class Served:
    """One loaded model. version: what names it beside the service's model name. under_way: requests that hold it."""

    engine: "Engine"
    version: str | None = None
    under_way: int = 0


class Models:
    """Which model serves; every method is safe to call from any thread. name: what clients call the model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Served | None = None
        """None until a model is loaded."""
        self._former: list[Served] = []
        self._past = NOTHING_DONE
        self._lock = threading.Lock()

    def serve(self, engine: "Engine", version: str | None = None) -> Served | None:
        """From now on requests get this engine; returns the model that they got before, to be retired."""
        with self._lock:
            former, self.current = self.current, Served(engine, version)
            if former:
                self._former.append(former)
        return former

    @contextmanager
    def hold(self) -> Iterator[Served]:
        """The model that serves, which is not retired meanwhile. There must be one."""
        with self._lock:
            served = self.current
            assert served
            served.under_way += 1
        try:
            yield served
        finally:
            with self._lock:
                served.under_way -= 1

    def retire(self, former: Served) -> None:
        """Stop the engine of a model that another took over from, and forget it; what it counted stays counted."""
        former.engine.stop()
        with self._lock:
            self._past = _sum(self._past, _totals(former.engine.stats()))
            self._former.remove(former)

    def stats(self) -> EngineStats:
        """What all models do now and have done."""
        with self._lock:
            total = self._past
            for served in (*self._former, *([self.current] if self.current else [])):
                total = _sum(total, served.engine.stats())
        return total

    def stop(self) -> None:
        """End every engine."""
        with self._lock:
            served = (*self._former, *([self.current] if self.current else []))
        for one in served:
            one.engine.stop()


def _sum(first: EngineStats, second: EngineStats) -> EngineStats:
    return EngineStats(*(getattr(first, f.name) + getattr(second, f.name) for f in fields(EngineStats)))


def _totals(stats: EngineStats) -> EngineStats:
    """What was done, without what is going on."""
    return replace(stats, **{f.name: 0 for f in fields(EngineStats) if not f.name.endswith("_total")})
