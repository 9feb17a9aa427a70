"""What `python -m bench.engine` compares: which runs, and that the engine's workloads do the work that they count."""

import pytest

from bench.engine import comparison, llama_cpp, vllm
from bench.engine.ours import OurEngineInt8
from bench.engine.workloads import CONTEXT
from model.build import build_config, build_model
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings
from tests.support.vllm import needs_vllm


def test_int8_stands_beside_q8_0_and_float32_beside_f32(monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    for precision, peer in (("int8", "llama.cpp Q8_0"), ("float32", "llama.cpp F32")):
        pairs = comparison.choose_pairs(["llama.cpp"], precision, None)
        assert {(ours[0], other[0]) for ours, other in pairs} == {(f"engine {precision}", peer)}
        assert all(ours[1] == other[1] for ours, other in pairs)


def test_an_opponent_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    with pytest.raises(PipelineError, match="pip install llama-cpp-python"):
        comparison.choose_pairs(["llama.cpp"], None, None)
    assert "llama.cpp" not in str(comparison.choose_pairs(None, None, None))


def test_vllm_computes_the_same_precision_and_its_absence_is_one_line(monkeypatch):
    monkeypatch.setattr(vllm, "installed", lambda: False)
    with pytest.raises(PipelineError, match=r"vLLM is not installed: .* run make vllm, or set VLLM_PYTHON"):
        comparison.choose_pairs(["vllm"], None, None)
    monkeypatch.setattr(vllm, "installed", lambda: True)
    assert all(
        pair == (("engine float32", pair[0][1]), ("vLLM float32", pair[0][1])) for pair in comparison.PAIRS["vllm"]
    )
    assert comparison.choose_pairs(["vllm"], None, None) == comparison.PAIRS["vllm"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.processes
def test_each_workload_of_vllm_runs():
    contender = vllm.Vllm(tiny(1))
    contender.requests = 2
    for workload in ("one_stream", "one_sampled_stream", "prefill", "ragged_even"):
        assert getattr(contender, workload)() > 0


def test_a_choice_that_leaves_nothing_to_compare_is_refused():
    with pytest.raises(PipelineError, match="nothing to compare"):
        comparison.choose_pairs(["reference"], "float32", ["prefill"])


def tiny(heads: int) -> RexForCausalLM:
    shape = ModelSettings(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
    )
    return build_model(build_config(shape, 300, 0, 0, 1), seed=0).eval().requires_grad_(False)


def test_each_workload_of_the_engine_generates_the_tokens_that_it_counts():
    contender = OurEngineInt8(tiny(2))
    contender.requests = 2
    made = contender._engine.stats
    before = 0
    for workload, tokens in {"one_stream": 96, "eight_streams": 8 * 96, "prefill": 1, "ragged_even": None}.items():
        assert getattr(contender, workload)() > 0
        count = made().generated_tokens_total - before
        before += count
        assert count == (sum(contender._even_answers[:2]) if tokens is None else tokens)
    contender._engine.stop()
