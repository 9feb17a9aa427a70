"""The served model, and former models that still finish their requests after a rollover.

A request keeps the model (engine and tokenizer) that it started with until its last byte: `hold` counts the requests of
each model, and `serve` swaps the pointer for later requests.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from model.generation.requests import EngineStats

if TYPE_CHECKING:
    from bento.serving.shadow import Rollback, Shadow
    from model.generation.engine import Engine

CHALLENGER = "challenger"
NO_ACTIVITY = EngineStats(*[0] * len(fields(EngineStats)))


@dataclass(eq=False)
class Served:
    """One loaded model. version: distinguishes it from other versions of the same name. under_way: requests that hold
    it. name: in answers, if it is not the service's. origin: settings, dataset and runs, if its folder says them.
    """

    engine: "Engine"
    version: str | None = None
    under_way: int = 0
    name: str | None = None
    origin: Mapping[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: identifies weights, engine and precision. /server_info has the parts and the origin."""
        return f"fp_{self.version or 'local'}_{self.engine.step_name}_{self.engine.precision}"


class Models:
    """The served model and its predecessors. Thread-safe. name: the model's name in answers. aliases: other names that
    requests may use.
    """

    def __init__(self, name: str, aliases: Sequence[str] = ()) -> None:
        self.name, self.aliases = name, tuple(aliases)
        self.shadow: Shadow | None = None
        self.rollback: Rollback | None = None
        """Both None unless their options are set."""
        self.current: Served | None = None
        """None until a model is loaded."""
        self._former: list[Served] = []
        self._past = NO_ACTIVITY
        self._lock = threading.Lock()

    def serve(
        self, engine: "Engine", version: str | None = None, origin: Mapping[str, Any] | None = None
    ) -> Served | None:
        """Serve new requests with this engine. Returns the former model, to be passed to `retire`."""
        with self._lock:
            former, self.current = self.current, Served(engine, version, origin=origin)
            if former:
                self._former.append(former)
        return former

    @contextmanager
    def hold(self) -> Iterator[Served]:
        """Hold the served model: it is not retired inside this context. Raises AssertionError if none is loaded."""
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
        """Stop a former model's engine and drop it. Its totals stay in `stats`."""
        former.engine.stop()
        with self._lock:
            self._past = _sum(self._past, _totals(former.engine.stats()))
            self._former.remove(former)

    def names(self) -> set[str]:
        """Names that requests may use for the served model: with the version and without it, and the aliases."""
        version = self.version()
        return {self.name, self._stable, *self.aliases, *([f"{self._stable}:{version}"] if version else [])}

    @property
    def challenger(self) -> Served | None:
        """The model of a shadow phase, named as MLflow names an alias: `rex-stdlib@challenger`."""
        found = self.shadow.challenger if self.shadow else None
        return Served(*found, name=f"{self._stable}@{CHALLENGER}") if found else None

    def challenger_named(self, name: str | None) -> Served | None:
        """The challenger, if a request names it and not the served model."""
        challenger = self.challenger
        if challenger is None or not name or name in self.names():
            return None
        return challenger if name in (challenger.name, f"{self._stable}:{challenger.version}") else None

    @property
    def _stable(self) -> str:
        return self.name.partition(":")[0]

    def version(self) -> str | None:
        """Version of the served model, empty for one without; None while no model is loaded."""
        served = self.current
        return (served.version or "") if served else None

    def engine_info(self) -> tuple[str, str] | None:
        """Step and precision of the current engine, None while no model is loaded."""
        current = self.current
        return (current.engine.step_name, current.engine.precision) if current else None

    def stats(self) -> EngineStats:
        """The sum over all models: current activity, and totals since the start."""
        with self._lock:
            total = self._past
            for served in (*self._former, *([self.current] if self.current else [])):
                total = _sum(total, served.engine.stats())
        return total

    def stop(self) -> None:
        """Stop every engine."""
        with self._lock:
            served = (*self._former, *([self.current] if self.current else []))
        for one in served:
            one.engine.stop()


def _sum(first: EngineStats, second: EngineStats) -> EngineStats:
    return EngineStats(*(getattr(first, f.name) + getattr(second, f.name) for f in fields(EngineStats)))


def _totals(stats: EngineStats) -> EngineStats:
    """Totals only, current activity zeroed."""
    return replace(stats, **{f.name: 0 for f in fields(EngineStats) if not f.name.endswith("_total")})
