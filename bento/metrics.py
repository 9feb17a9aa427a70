"""Prometheus metrics of the service, in a registry of their own.

Labels come from fixed sets: BentoML's own metrics take the requested path as a label, so anyone could make them grow.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServiceMetrics:
    """What is counted. waiting, running: asked whenever the metrics are read."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rex_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )  # fmt: skip
        self.prompt_tokens = Counter("rex_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.generated_tokens = Counter("rex_generated_tokens", "Tokens generated.", registry=self._registry)
        self.time_to_first_token = Histogram(
            "rex_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        Gauge("rex_num_requests_waiting", "Requests in the queue.", registry=self._registry).set_function(waiting)
        Gauge("rex_num_requests_running", "Requests that generate.", registry=self._registry).set_function(running)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
