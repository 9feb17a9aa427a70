"""Prometheus metrics of the service, in a registry of their own, named like vLLM's with `rex_` in front.

Labels come from fixed sets: BentoML's own metrics take the requested path as a label, so anyone could make them grow.
Everything is counted in plain numbers by the event loop's thread alone, so a token costs neither a lock nor a memory map
(BentoML's PROMETHEUS_MULTIPROC_DIR would give prometheus_client's own counters both); what the engine knows is asked of
it when the metrics are read.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from bento.serving.models import Models

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Distribution:
    """A histogram: how many values fell below each bound. Not for several threads."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self._name, self._meaning, self._bounds = name, meaning, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self) -> Metric:
        """As Prometheus reads it."""
        below, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            buckets.append((floatToGoString(bound), below))
        return HistogramMetricFamily(self._name, self._meaning, buckets=buckets, sum_value=self._sum)


class ServiceMetrics(Collector):
    """What is counted. models: whose engines' numbers are shown."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.requests: Counter[tuple[str, str, str]] = Counter()
        """By route, status and finish reason; "-" where nothing was generated."""
        self.rejections: Counter[str] = Counter()
        """By the code of the refusal: the service had no place or was not there."""
        self.time_to_first_token = Distribution(
            "rex_time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS
        )
        self.inter_token_latency = Distribution(
            "rex_inter_token_latency_seconds", "From a token to the next of the same text.", TOKEN_SECONDS
        )
        self.queue_time = Distribution(
            "rex_request_queue_time_seconds", "From a request's submission to its start.", SECONDS
        )
        self.end_to_end = Distribution(
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
            "rex_requests_rejected", "Requests refused for want of a place or a model.", labels=["reason"]
        )
        for reason, count in self.rejections.items():
            rejections.add_metric([reason], count)
        yield from (requests, rejections)
        for distribution in (self.time_to_first_token, self.inter_token_latency, self.queue_time, self.end_to_end):
            yield distribution.family()
        yield from self._engine_families()

    def _engine_families(self) -> Iterator[Metric]:
        stats, served = self._models.stats(), self._models.current
        used = stats.cache_tokens / stats.cache_capacity_tokens if stats.cache_capacity_tokens else 0.0
        # One series at a time, however many versions come: a label of its own for each would stay for ever.
        info = GaugeMetricFamily("rex_model_info", "1 for the version that serves.", labels=["model", "version"])
        if served:
            info.add_metric([self._models.name, served.version or ""], 1)
        yield info
        for name, meaning, value in (
            ("rex_num_requests_running", "Requests that generate.", stats.running),
            ("rex_num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("rex_num_tokens_waiting", "Prompt tokens of the requests in the queue.", stats.waiting_tokens),
            ("rex_kv_cache_usage_perc", "Part of the cache that running requests hold; 1 is all of it.", used),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        for name, meaning, count in (
            ("rex_prompt_tokens", "Tokens of prompts that were started.", stats.prompt_tokens_total),
            ("rex_generation_tokens", "Tokens generated.", stats.generated_tokens_total),
            ("rex_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens_total),
            ("rex_prefix_cache_hits", "Prompt tokens that the prefix cache held.", stats.cached_tokens_total),
            ("rex_requests_cancelled", "Requests that ended because their client left.", stats.cancelled_total),
            ("rex_engine_restarts", "Times that the engine started again.", stats.restarts_total),
        ):
            yield CounterMetricFamily(name, meaning, count)
