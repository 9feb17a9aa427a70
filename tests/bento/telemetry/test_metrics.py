"""Metrics: what each says, that their number is bounded, and that the dashboard asks only for what exists."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import bento
from bento.serving.models import Models
from bento.telemetry import record
from bento.telemetry.metrics import Histogram, ServiceMetrics
from bento.telemetry.record import RequestRecord
from model.generation.requests import EngineStats, Finished, Generation, GenerationRequest
from tests.bento.conftest import make_service

DASHBOARD = json.loads((Path(bento.__file__).parent / "grafana.json").read_text())
STATS = EngineStats(
    running=3,
    waiting=5,
    waiting_tokens=70,
    cache_tokens=25,
    cache_capacity_tokens=100,
    prompt_tokens_total=200,
    cached_tokens_total=50,
    generated_tokens_total=400,
    cancelled_total=6,
    restarts_total=1,
    cache_bytes=4096,
    proposed_tokens_total=90,
    accepted_tokens_total=60,
)


class Engine:
    step_name, precision = "reference", "int8"

    def stats(self) -> EngineStats:
        return STATS


def samples(metrics: ServiceMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


@pytest.fixture
def metrics() -> ServiceMetrics:
    models = Models("rex-tiny")
    models.serve(Engine(), "7")
    return ServiceMetrics(models.stats, model_name=models.name, version=models.version, engine=models.engine_info)


def test_the_engines_numbers_are_shown(metrics):
    shown = samples(metrics)
    expected = {
        "rex_num_requests_running": 3,
        "rex_num_requests_waiting": 5,
        "rex_num_tokens_waiting": 70,
        "rex_kv_cache_usage_perc": 0.25,
        "rex_kv_cache_bytes": 4096,
        "rex_prompt_tokens_total": 200,
        "rex_generation_tokens_total": 400,
        "rex_prefix_cache_queries_total": 200,
        "rex_prefix_cache_hits_total": 50,
        "rex_requests_cancelled_total": 6,
        "rex_engine_restarts_total": 1,
        "rex_spec_decode_num_draft_tokens_total": 90,
        "rex_spec_decode_num_accepted_tokens_total": 60,
    }
    assert {name: shown[name] for name in expected} == expected


def test_the_version_that_serves_is_named(metrics):
    assert 'rex_model_info{model="rex-tiny",version="7"} 1.0' in metrics.text().decode()


def test_how_the_engine_computes_is_named(metrics):
    assert 'rex_engine_info{precision="int8",step="reference"} 1.0' in metrics.text().decode()
    assert "rex_engine_info{" not in ServiceMetrics(Models("rex-tiny").stats).text().decode()


def test_metrics_are_readable_before_there_is_an_engine():
    assert samples(ServiceMetrics(Models("rex-tiny").stats))["rex_num_requests_running"] == 0


def test_a_distribution_counts_each_value_below_its_bounds():
    histogram = Histogram("rex_test_seconds", "Test.", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    found = {sample.labels["le"]: sample.value for sample in histogram.family().samples if "le" in sample.labels}
    assert found == {"0.1": 2, "1.0": 3, "+Inf": 4}


def test_a_clock_distinguishes_the_first_token_from_later_ones_and_counts_generated_tokens(metrics):
    request = RequestRecord("id", metrics)
    for cached in (0, 2):
        generation = Generation(GenerationRequest([1, 2, 3], 5))
        clock = request.follow(generation)
        generation.start(cached)
        for _ in range(4):
            clock.tick(1)
        generation.generated_tokens = 4
        clock.stop(Finished("length", 3, 4))
    shown = samples(metrics)
    assert shown["rex_time_to_first_token_seconds_count"] == 2
    assert shown["rex_inter_token_latency_seconds_count"] == 6
    assert shown["rex_request_queue_time_seconds_count"] == 2
    assert (request.generated_tokens, request.cached_tokens, request.finish_reason) == (8, 2, "length")


def test_tokens_that_arrive_together_share_the_time_since_the_last_ones(metrics, monkeypatch):
    now = 100.0
    monkeypatch.setattr(record.time, "monotonic", lambda: now)
    clock = RequestRecord("id", metrics).follow(Generation(GenerationRequest([1, 2, 3], 20)))
    clock.tick(1)
    for tokens in (8, 0, 2):  # of a call of several tokens; the end of held-back text; proposed tokens
        now += 0.08
        clock.tick(tokens)
    shown = samples(metrics)
    assert shown["rex_inter_token_latency_seconds_count"] == 10
    assert shown["rex_inter_token_latency_seconds_sum"] == pytest.approx(0.16)


def test_no_client_can_make_the_metrics_grow():
    service = make_service()
    with TestClient(service.app) as client:
        client.post("/generate", json={"prompt": "x", "max_tokens": 2})
        client.get("/nothing")

        def lines() -> int:
            return len(client.get("/metrics").text.splitlines())

        lines()
        before = lines()
        for number in range(20):
            client.get(f"/nothing/{number}")
            client.post("/generate", json={"prompt": "x", "max_tokens": 2}, headers={"X-Request-Id": f"id-{number}"})
            client.request("GET", "/nothing", headers={"Host": f"host-{number}", "traceparent": str(number)})
        assert lines() == before
    service.engine.stop()


def test_the_dashboard_asks_for_every_metric_and_for_nothing_else():
    service = make_service()
    with TestClient(service.app) as client:
        client.post("/generate", json={"prompt": "x", "max_tokens": 2})
        service.app.state.admission.is_draining = True
        client.post("/generate", json={"prompt": "x", "max_tokens": 2})
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    service.engine.stop()
    names = {sample.name for family in families for sample in family.samples}
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"rex_\w+", " ".join(queries)))
    assert asked <= names
    parts = ("_bucket", "_sum", "_count")
    assert {name for name in names if not name.endswith(parts)} | {n for n in names if n.endswith("_bucket")} == asked
    grouped = {
        label for query in queries for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")
    }
    assert grouped <= labels
