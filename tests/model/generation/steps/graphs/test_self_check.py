"""The comparison of the graphs step with the reference when it starts: whatever is wrong is found."""

import logging

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.steps import choose
from model.generation.steps.graphs import passes, plain
from model.generation.steps.graphs.decoder import Rows
from tests.support.graphs import GraphStepOnCPU
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("operation", "broken"),
    [
        ("attention", lambda right: lambda *given: right(*given).roll(1, 1)),
        ("silu_times", lambda right: lambda *given: right(*given).flip(1)),
        ("norm", lambda right: lambda x, weight, eps: right(x, weight.flip(0), eps)),
        ("choose", lambda right: lambda logits_RV, draws: right(logits_RV, draws) // 2),
        ("choose", lambda right: lambda logits_RV, draws: right(logits_RV * 2, draws)),
        ("adjust", lambda right: lambda *given: None),
        ("adjust", lambda right: lambda logits_RV, *given: right(logits_RV.mul_(1 - given[-1][:, None] / 2), *given)),
    ],
)
def test_a_wrong_kernel_is_refused_and_the_reference_takes_over(monkeypatch, caplog, operation, broken):
    model, tokenizer = tiny_model(tiny_tokenizer(), hidden_size=64), tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    for norm in (layer.input_layernorm for layer in model.model.layers):
        norm.weight.copy_(torch.rand(64, generator=generator) + 0.5)
    GraphStepOnCPU.create(model, 4)
    monkeypatch.setattr(plain, operation, broken(getattr(plain, operation)))
    with pytest.raises(PipelineError, match=r"the step 'graphs' is wrong on this machine: in a step of [124] rows"):
        GraphStepOnCPU.create(model, 4)
    steps = {"graphs": "tests.support.graphs:GraphStepOnCPU", "reference": choose.STEPS["reference"]}
    monkeypatch.setattr(choose, "STEPS", steps)
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, tokenizer)
    assert engine.step_name == "reference" and "the step 'reference' computes instead" in caplog.text
    engine.stop()
    with pytest.raises(PipelineError, match="is wrong on this machine"):
        Engine(model, tokenizer, step="graphs")


def _forgets(right):
    def attention(q_NHK, places, scale):
        out_NE = right(q_NHK, places, scale)
        return torch.where(places.position_N[:, None] < 600, out_NE, 0.0)

    return attention


@pytest.mark.parametrize(
    ("target", "name", "broken", "where"),
    [
        (plain, "attention", _forgets, "a text of 1,024 tokens its logits differ"),
        (
            Rows,
            "known",
            lambda right: lambda *given: right(*given)._replace(id_N=given[0].id_N.clamp(min=0)),
            "in a step of 1 rows it chose",
        ),
        (Rows, "known", lambda right: lambda rows, chosen: right(rows, chosen.roll(1)), "in a step of [12] rows"),
        (
            passes,
            "packed",
            lambda right: lambda allowed_V: right(np.roll(allowed_V, 1)),
            "in a step of [12] rows",
        ),
        (passes, "packed", lambda right: lambda allowed_V: right(allowed_V | True), "in a step of [12] rows"),
    ],
    ids=["long texts", "no token", "another text's token", "another mask", "no mask"],
)
def test_what_only_some_steps_have_is_compared_too(monkeypatch, target, name, broken, where):
    model = tiny_model(tiny_tokenizer(), max_position_embeddings=1024)
    GraphStepOnCPU.create(model, 4)
    monkeypatch.setattr(target, name, broken(getattr(target, name)))
    with pytest.raises(PipelineError, match=where):
        GraphStepOnCPU.create(model, 4)
