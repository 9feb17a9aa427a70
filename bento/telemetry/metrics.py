"""Prometheus metrics of the service, in a separate registry, named like vLLM's with the prefix `rex_`.

Label values come from fixed sets: BentoML's own metrics use the requested path as a label, so any client could grow
them without bound. Only the event loop's thread counts, in plain numbers: prometheus_client's counters would need a
lock and a memory map per token (because of BentoML's PROMETHEUS_MULTIPROC_DIR). The engine's numbers are read at each
scrape.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from model.generation.requests import EngineStats

if TYPE_CHECKING:
    from bento.serving.shadow import Shadow

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram:
    """A histogram: the number of values below each bound. Not thread-safe."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self._name, self._meaning, self._bounds = name, meaning, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self) -> Metric:
        """The metric family for Prometheus."""
        below, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            buckets.append((floatToGoString(bound), below))
        return HistogramMetricFamily(self._name, self._meaning, buckets=buckets, sum_value=self._sum)


class ServiceMetrics(Collector):
    """All metrics of the service.

    stats: returns the engines' current numbers. model_name: label of the served model. version: of the served model;
    None while no model is loaded, an empty text for one without a version. engine: step and precision of the served
    model's engine. shadow: the challenger beside it, if there is a shadow phase.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        *,
        model_name: str = "",
        version: Callable[[], str | None] = lambda: None,
        engine: Callable[[], tuple[str, str] | None] = lambda: None,
        shadow: Callable[[], "Shadow | None"] = lambda: None,
    ) -> None:
        self._engine, self._shadow = engine, shadow
        self._stats, self._model_name, self._version = stats, model_name, version
        self.requests: Counter[tuple[str, str, str]] = Counter()
        """Requests by route, status and finish reason; "-" if nothing was generated."""
        self.rejections: Counter[str] = Counter()
        """Refused requests by error code: no capacity, or no model."""
        self.time_to_first_token = Histogram(
            "rex_time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS
        )
        self.inter_token_latency = Histogram(
            "rex_inter_token_latency_seconds", "From a token to the next of the same text.", TOKEN_SECONDS
        )
        self.queue_time = Histogram(
            "rex_request_queue_time_seconds", "From a request's submission to its start.", SECONDS
        )
        self.end_to_end = Histogram(
            "rex_e2e_request_latency_seconds", "From the arrival to the end of a request that generated.", SECONDS
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        requests = CounterMetricFamily(
            "rex_requests", "Requests answered.", labels=["route", "status", "finish_reason"]
        )  # fmt: skip
        for labels, count in self.requests.items():
            requests.add_metric(labels, count)
        rejections = CounterMetricFamily(
            "rex_requests_rejected",
            "Requests refused because the queue was full or no model was ready.",
            labels=["reason"],
        )
        for reason, count in self.rejections.items():
            rejections.add_metric([reason], count)
        yield from (requests, rejections)
        for histogram in (self.time_to_first_token, self.inter_token_latency, self.queue_time, self.end_to_end):
            yield histogram.family()
        yield from self._engine_families()
        if shadow := self._shadow():
            yield from _shadow_families(shadow)

    def _engine_families(self) -> Iterator[Metric]:
        stats, version = self._stats(), self._version()
        used = stats.cache_tokens / stats.cache_capacity_tokens if stats.cache_capacity_tokens else 0.0
        # A single series: one series per version would accumulate with every rollover.
        info = GaugeMetricFamily("rex_model_info", "1 for the served version.", labels=["model", "version"])
        if version is not None:
            info.add_metric([self._model_name, version], 1)
        yield info
        engine = GaugeMetricFamily(
            "rex_engine_info", "1 for the engine's step and precision.", labels=["step", "precision"]
        )
        if computes := self._engine():
            engine.add_metric(computes, 1)
        yield engine
        for name, meaning, value in (
            ("rex_num_requests_running", "Requests that are generating.", stats.running),
            ("rex_num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("rex_num_tokens_waiting", "Prompt tokens of the requests in the queue.", stats.waiting_tokens),
            ("rex_kv_cache_usage_perc", "Fraction of the cache that running requests hold; 1 is all of it.", used),
            (
                "rex_kv_cache_bytes",
                "Memory of keys and values, those kept for later prompts included.",
                stats.cache_bytes,
            ),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        for name, meaning, count in (
            ("rex_prompt_tokens", "Tokens of prompts that were started.", stats.prompt_tokens_total),
            ("rex_generation_tokens", "Tokens generated.", stats.generated_tokens_total),
            ("rex_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens_total),
            ("rex_prefix_cache_hits", "Prompt tokens that the prefix cache held.", stats.cached_tokens_total),
            ("rex_spec_decode_num_draft_tokens", "Tokens proposed to be checked.", stats.proposed_tokens_total),
            ("rex_spec_decode_num_accepted_tokens", "Proposed tokens accepted.", stats.accepted_tokens_total),
            ("rex_requests_cancelled", "Requests that ended because their client left.", stats.cancelled_total),
            ("rex_engine_restarts", "Restarts of the engine.", stats.restarts_total),
        ):
            yield CounterMetricFamily(name, meaning, count)


def _shadow_families(shadow: "Shadow") -> Iterator[Metric]:
    generations = CounterMetricFamily(
        "rex_shadow_generations", "Copied generations, of each model.", labels=["model", "outcome"]
    )
    speed = GaugeMetricFamily(
        "rex_shadow_seconds_per_token", "Median of the window's copied generations, waiting included.", labels=["model"]
    )
    for model, outcomes in (("champion", shadow.of_champion), ("challenger", shadow.of_challenger)):
        generations.add_metric([model, "failed"], outcomes.total_failed)
        generations.add_metric([model, "answered"], outcomes.total - outcomes.total_failed)
        speed.add_metric([model], outcomes.summary().seconds_per_token)
    yield generations
    yield speed
    yield CounterMetricFamily("rex_shadow_skipped", "Requests that the challenger could not take.", shadow.skipped)
