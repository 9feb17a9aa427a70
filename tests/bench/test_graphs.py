"""The benchmark of the graphs step: the host's part, and all of it as far as a CPU runs it."""

import pytest

from bench.engine import graphs
from model.generation.steps import choose
from model.weights import int8
from tests.support.graphs import use_graphs_on_cpu


def test_the_host_is_measured_without_a_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "ANSWER", 12)
    found = graphs.host_figures("2m", [1, 3], rounds=1)
    assert list(found) == [
        f"host's part of a step, {streams} streams, {how}, us"
        for streams in (1, 3)
        for how in ("greedy", "sampled", "penalized")
    ]
    assert all(0 < value < 1e6 for value in found.values())
    assert "host" not in choose.STEPS


def test_without_a_gpu_one_may_be_pretended(monkeypatch):
    monkeypatch.setattr(graphs, "ANSWER", 24)
    found = graphs.host_figures("2m", [1, 3], rounds=1, pass_us=5000)
    assert next(iter(found)) == "share of a device of 5000 us a pass, 1 streams, greedy" and len(found) == 6
    # No faster than the device, but for the first and last moment of a run.
    assert all(0 < value < 3 for value in found.values())


@pytest.mark.medium
def test_the_figures_of_a_gpu_are_ratios_of_one_run(monkeypatch):
    use_graphs_on_cpu(monkeypatch)
    monkeypatch.setattr(int8, "INT8_MIN_WEIGHTS", 1 << 30)  # float activations, as on a GPU
    monkeypatch.setattr(graphs, "ANSWER", 3)
    monkeypatch.setattr(graphs, "LONG_PROMPT", 70)
    monkeypatch.setattr(graphs, "BARE_S", 0.01)
    found = graphs.gpu_figures("2m", [1, 2], rounds=1, device="cpu")
    for streams in (1, 2):
        own = found[f"graphs, greedy, {streams} streams, tokens/s"]
        bare = found[f"bare graph, {streams} streams, tokens/s"]
        assert found[f"graphs / bare graph, {streams} streams"] == pytest.approx(own / bare)
        assert found[f"int8 / bfloat16, {streams} streams"] > 0
        assert found[f"penalized / greedy, {streams} streams"] > 0
    assert found["first token of 70 tokens, ms"] > 0 and found["start to ready, s"] > 0
