"""The shadow phase: a challenger answers copies of a share of the requests, and its answers are dropped.

The challenger is the version with the alias `challenger` of the registered model whose champion is served. Errors and
seconds per token of both are compared on the copied requests, in /metrics and in one log line per window. A request
that names the challenger is answered by it (`Models.challenger`) and not copied. After a new champion took over,
`Rollback` restores the former one if the new one fails or is slow. Off by default (`shadow_share` 0,
`rollback_window_s` 0): then none of this is created.
"""

import logging
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bento.serving.champion import ModelRegistry, Version, one_line
from bento.serving.models import CHALLENGER
from model.errors import PipelineError
from model.generation.requests import EngineBusy, EngineStopped, Event, Finished, GenerationRequest

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.shadow")  # BentoML's log configuration shows loggers below `bentoml`
FAILED = ("error", "timeout")
MAX_KEPT = 10_000


@dataclass(frozen=True)
class Summary:
    """Results of some generations. seconds_per_token: the median, waiting included; 0 without tokens."""

    generations: int
    failed: int
    seconds_per_token: float

    @property
    def error_rate(self) -> float:
        """The part that failed."""
        return self.failed / self.generations if self.generations else 0.0


class Outcomes:
    """Results of one model's generations in the last `window_s` seconds. Thread-safe."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, bool, float]] = deque(maxlen=MAX_KEPT)
        self.total = self.total_failed = 0

    def add(self, last: Finished, seconds: float) -> None:
        """Count a generation. One that its client canceled, or that was refused, is not evidence about the model."""
        if last.finish_reason == "cancelled" or last.is_refusal:
            return
        is_failed = last.finish_reason in FAILED
        per_token = seconds / last.generated_tokens if last.generated_tokens and not is_failed else 0.0
        with self._lock:
            self.total += 1
            self.total_failed += is_failed
            self._kept.append((time.monotonic(), is_failed, per_token))

    def summary(self) -> Summary:
        """The results in the window."""
        since = time.monotonic() - self._window_s
        with self._lock:
            while self._kept and self._kept[0][0] < since:
                self._kept.popleft()
            kept = list(self._kept)
        times = [per_token for _, _, per_token in kept if per_token]
        return Summary(len(kept), sum(failed for _, failed, _ in kept), statistics.median(times) if times else 0.0)

    def clear(self) -> None:
        """Forget the window; the totals stay."""
        with self._lock:
            self._kept.clear()


class Shadow:
    """Copies requests to a challenger. share: of the requests, 0 to 1."""

    def __init__(self, share: float, window_s: float) -> None:
        self._share, self._random = share, random.Random()
        self.challenger: tuple[Engine, str] | None = None
        """Its engine and version."""
        self.of_champion, self.of_challenger = Outcomes(window_s), Outcomes(window_s)
        self.skipped = 0
        """Copies that were not sent: the challenger's queue was full or it did not accept the request."""

    def copy(
        self, champion: "Engine", requests: Sequence[GenerationRequest]
    ) -> Callable[[Finished, float], None] | None:
        """Send a copy of some requests. Returns the function to call with each original's end; None without a copy."""
        challenger = self.challenger
        if challenger is None or challenger[0] is champion or self._random.random() >= self._share:
            return None
        engine, started = challenger[0], time.monotonic()

        def take(index: int, event: Event) -> None:
            if isinstance(event, Finished):
                self.of_challenger.add(event, time.monotonic() - started)

        try:
            engine.submit_all([_for_tokenizer(one, champion, engine) for one in requests], take)
        except (EngineBusy, EngineStopped, PipelineError):
            self.skipped += 1
            return None
        return self.of_champion.add

    def serve(self, engine: "Engine | None", version: str = "") -> None:
        """Replace the challenger; None ends the phase."""
        former, self.challenger = self.challenger, (engine, version) if engine else None
        for outcomes in (self.of_champion, self.of_challenger):
            outcomes.clear()
        if former:
            former[0].stop()

    def report(self) -> str:
        """One line that compares both."""
        champion, challenger = self.of_champion.summary(), self.of_challenger.summary()
        version = self.challenger[1] if self.challenger else ""
        return (
            f"shadow phase of version {version}: {challenger.generations} copies, {challenger.failed} failed, "
            f"{1000 * challenger.seconds_per_token:.1f} ms per token; the champion on the same requests: "
            f"{champion.failed} failed, {1000 * champion.seconds_per_token:.1f} ms; {self.skipped} copies skipped"
        )


def _for_tokenizer(request: GenerationRequest, champion: "Engine", challenger: "Engine") -> GenerationRequest:
    """The request for the challenger. Raises PipelineError for one that is tied to the champion's tokens."""
    if challenger.token_bytes == champion.token_bytes:
        return request
    if request.grammar or request.stop_token_ids or request.allowed_token_ids or request.sampling.logit_bias:
        raise PipelineError("the request contains token ids, and the challenger's vocabulary differs")
    return replace(request, prompt_ids=challenger.encode(champion.decode(request.prompt_ids)))


class ChallengerWatcher:
    """Keeps the challenger of the registered model `name` in a shadow, in its own thread.

    load: creates a warmed-up engine from a model directory and a version number. poll_s: seconds between polls.
    report_s: seconds between log lines.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        name: str,
        shadow: Shadow,
        *,
        load: Callable[[Path, str], "Engine"],
        poll_s: float,
        report_s: float,
    ) -> None:
        self._registry, self._name, self._shadow, self._load = registry, name, shadow, load
        self._poll_s, self._report_s = poll_s, report_s
        self._known: Version | None = None
        self._said = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="challenger", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling, and the challenger's engine."""
        self._stopping.set()
        self._shadow.serve(None)

    def _run(self) -> None:
        reported = time.monotonic()
        while not self._stopping.is_set():
            self.follow()
            if self._shadow.challenger and time.monotonic() - reported >= self._report_s:
                reported = time.monotonic()
                logger.info("%s", self._shadow.report())
            self._stopping.wait(self._poll_s)

    def follow(self) -> None:
        """Poll once. A reason why the challenger cannot be followed is logged once."""
        try:
            found = self._registry.find(self._name, CHALLENGER)
            if found and found == self._registry.champion(self._name):
                found = None  # promoted: a comparison with itself is meaningless and would take half of the machine
            if found != self._known:
                self._known = found
                self._shadow.serve(None)
                if found:
                    self._take_over(found)
            self._said = ""
        except Exception as error:  # noqa: BLE001 - a challenger must never disturb the service
            line = one_line(error)
            if line != self._said:
                self._said = line
                logger.warning("the %s of %r cannot be followed: %s", CHALLENGER, self._name, line)

    def _take_over(self, challenger: Version) -> None:
        import httpx

        try:
            with tempfile.TemporaryDirectory(prefix="rex-challenger-") as folder:
                directory = self._registry.download(self._name, challenger, Path(folder))
                engine = self._load(directory, challenger.number)
        except httpx.HTTPError:
            self._known = None  # the next poll tries again
            raise
        self._shadow.serve(engine, challenger.number)
        logger.info("version %s of %r answers copies of requests", challenger.number, self._name)
        if self._stopping.is_set():
            self._shadow.serve(None)


@dataclass
class _Trial:
    former: Version
    new: Version
    began: float
    before: Summary


class Rollback:
    """Restores the former champion if the new one exceeds a bound within `window_s` of taking over.

    max_error_rate: of failed generations, 0 to 1. max_slowdown: seconds per token as a multiple of the former
    champion's. min_generations: minimum number of generations for a decision.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        name: str,
        *,
        window_s: float,
        max_error_rate: float,
        max_slowdown: float,
        min_generations: int,
    ) -> None:
        self._registry, self._name, self._window_s = registry, name, window_s
        self._max_error_rate, self._max_slowdown = max_error_rate, max_slowdown
        self._min_generations = min_generations
        self._outcomes = Outcomes(window_s)
        self._trial: _Trial | None = None

    def add(self, last: Finished, seconds: float) -> None:
        """Count a generation of the served model."""
        self._outcomes.add(last, seconds)

    def took_over(self, former: Version | None, new: Version) -> None:
        """A new champion serves from now on; None: there was no champion before, so there is nothing to restore."""
        before = self._outcomes.summary()
        self._outcomes.clear()
        self._trial = _Trial(former, new, time.monotonic(), before) if former else None

    def check(self) -> None:
        """Restore the former champion if there is a reason. Raises httpx.HTTPError; the next check tries again."""
        trial = self._trial
        if trial is None:
            return
        if reason := self._reason(trial, self._outcomes.summary()):
            logger.warning("version %s of %r: %s", trial.new.number, self._name, reason)
            if self._registry.roll_back(self._name, trial.new, trial.former, reason):
                logger.warning("version %s of %r is champion again", trial.former.number, self._name)
            self._trial = None
        elif time.monotonic() - trial.began > self._window_s:
            logger.info("version %s of %r has kept the bounds", trial.new.number, self._name)
            self._trial = None

    def _reason(self, trial: _Trial, now: Summary) -> str | None:
        if now.generations < self._min_generations:
            return None
        if now.error_rate > self._max_error_rate:
            return (
                f"{now.failed} of {now.generations} generations failed within {self._window_s:g} s (at most "
                f"{self._max_error_rate:.1%})"
            )
        slowest = self._max_slowdown * trial.before.seconds_per_token
        if trial.before.generations >= self._min_generations and now.seconds_per_token > slowest:
            return (
                f"{1000 * now.seconds_per_token:.1f} ms per token, version {trial.former.number} took "
                f"{1000 * trial.before.seconds_per_token:.1f} (at most {self._max_slowdown:g} times that)"
            )
        return None
