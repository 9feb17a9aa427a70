"""OpenTelemetry: one span per request, sent to the collector at OTEL_EXPORTER_OTLP_ENDPOINT, if set.

A span is made from the request's record when the request has ended, so tracing adds no cost per token. It continues the
trace of a `traceparent` header (W3C). The SDK's own variables apply: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec

from bentoml.exceptions import InvalidArgument
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bento.telemetry.record import RequestRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
NANO = 1e9


def start_tracing(environment: Mapping[str, str] | None = None) -> "Tracer | None":
    """The tracer that the variables configure; None without a collector.

    Raises InvalidArgument, one line, if the exporter package is not installed.
    """
    environment = os.environ if environment is None else environment
    if not any(environment.get(name) for name in ENDPOINTS):
        return None
    try:
        found = find_spec(EXPORTER)
    except ModuleNotFoundError:  # a parent package is missing
        found = None
    if not found:
        raise InvalidArgument(
            f"{ENDPOINTS[0]} is set, but the exporter is not installed: pip install "
            "opentelemetry-exporter-otlp-proto-http"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracer(OTLPSpanExporter())


class Tracer:
    """Sends spans to `exporter` in batches, in its own thread; spans are dropped while the collector is unreachable."""

    def __init__(self, exporter: SpanExporter) -> None:
        # Read here because the SDK keeps the `os.environ` of its import, which `datasets` replaces with a copy.
        named = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "rex"})
        # `stop` shuts it down: the exit hook would block on an unreachable collector.
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rex")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, route: str, method: str, headers: Mapping[str, str], record: RequestRecord, seconds: float) -> str:
        """Record a request that took `seconds`. Returns the id of its trace in hexadecimal."""
        # Only the two W3C headers are read: no other client data may enter a trace.
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}

        def at(seconds: float) -> int:
            return record.started_ns + int(seconds * NANO)

        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=record.started_ns,
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": record.status,
                "rex.request_id": record.id,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.generated_tokens,
                "gen_ai.response.finish_reasons": [record.finish_reason],
            },
        )
        if record.submitted_s is not None:
            span.add_event("queued", timestamp=at(record.submitted_s))
            if record.queue_s is not None:
                span.add_event("started", timestamp=at(record.submitted_s + record.queue_s))
        if record.first_token_s is not None:
            span.add_event("first_token", timestamp=at(record.first_token_s))
        span.add_event("finished", {"finish_reason": record.finish_reason}, timestamp=at(seconds))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end(at(seconds))
        return format(span.get_span_context().trace_id, "032x")

    def stop(self) -> None:
        """Flush the remaining spans and end the thread."""
        self._provider.shutdown()
