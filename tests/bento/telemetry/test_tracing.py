"""Spans: one for each request, with its queueing and tokens, in the caller's trace, sent to a real OTLP receiver."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bentoml.exceptions import InvalidArgument
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from bento.telemetry import tracing
from bento.telemetry.tracing import Tracer, start_tracing
from tests.bento.conftest import make_service
from tests.bento.running_service import GREEDY

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def traced():
    service, exporter = make_service(), InMemorySpanExporter()
    tracer = service.app.state.tracer = Tracer(exporter)

    def spans() -> list:
        tracer._provider.force_flush()
        return list(exporter.get_finished_spans())

    with TestClient(service.app) as client:
        yield client, spans
    service.engine.stop()
    tracer.stop()


def test_a_span_tells_how_a_request_went_and_continues_its_callers_trace(traced):
    client, spans = traced
    answer = client.post("/generate", json={**GREEDY, "prompt": "secret"}, headers={"traceparent": PARENT})
    (span,) = spans()
    assert span.name == "POST /generate"
    assert format(span.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(span.parent.span_id, "016x") == PARENT.split("-")[2]
    assert [event.name for event in span.events] == ["queued", "started", "first_token", "finished"]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(times)
    assert span.attributes["rex.request_id"] == answer.headers["x-request-id"]
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["gen_ai.usage.output_tokens"] == 8
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "secret" not in span.to_json()


def test_unknown_paths_methods_and_parents_never_enter_a_span_name(traced):
    client, spans = traced
    client.request("BREW", "/coffee/with/milk", headers={"traceparent": "nonsense"})
    (span,) = spans()
    assert span.name == "_OTHER other"
    assert span.parent is None


def test_an_error_of_the_service_is_an_error_in_the_trace(traced):
    client, spans = traced
    client.app.state.models.stop()
    assert client.post("/generate", json=GREEDY).status_code == 503
    (span,) = spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "stopped"


def test_without_a_collector_nothing_is_traced():
    assert start_tracing({}) is None


def test_a_missing_exporter_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(tracing, "EXPORTER", "nowhere.exporter")
    with pytest.raises(InvalidArgument, match="pip install opentelemetry-exporter-otlp-proto-http") as refusal:
        start_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    assert "\n" not in str(refusal.value)


def test_spans_reach_an_otlp_receiver(monkeypatch):
    received: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "rex-test")
    service = make_service()
    service.app.state.tracer = start_tracing()
    TestClient(service.app).post("/generate", json=GREEDY)
    service.app.state.tracer.stop()
    service.engine.stop()
    receiver.shutdown()
    receiver.server_close()
    (resource,) = received[0].resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "rex-test"
    assert resource.scope_spans[0].spans[0].name == "POST /generate"
