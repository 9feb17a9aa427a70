"""REX's forward pass, loss and gradients: caches, padding, precision, compiling, checkpointing."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, StaticCache

from model.build import build_config, build_model, count_config_parameters
from model.configuration_rex import RexConfig
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings

VOCAB = 67


def tiny_model(seed: int = 0, **changes: Any) -> RexForCausalLM:
    """Two layers, four query heads on two key/value heads; weights large enough that every token matters."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return build_model(RexConfig(**{**shape, **changes}), seed).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_pad(prompts: list[torch.Tensor], pad: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.stack([functional.pad(p, (longest - len(p), 0), value=pad) for p in prompts])
    mask = torch.stack([functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    return ids, mask


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> RexForCausalLM:
    made = tiny_model().double()
    made.set_attn_implementation(request.param)
    return made


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Norm statistics and rotary angles are float32 by design, so a float64 model agrees to about 1e-6.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits(model: RexForCausalLM) -> None:
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % VOCAB
    before, after = model(ids).logits[0], model(changed).logits[0]
    assert_same(after[:7], before[:7])
    assert (after[7:] - before[7:]).abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [12]])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits_equal_uncached_ones(model: RexForCausalLM, chunks: list[int], kind: str) -> None:
    ids = tokens(2, 12)
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)
    cache = dynamic if kind == "dynamic" else static
    logits = [model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)]
    assert_same(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5]])
def test_cached_logits_of_a_left_padded_batch_equal_those_of_each_row_alone(
    model: RexForCausalLM, chunks: list[int]
) -> None:
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    ids, mask = left_pad(prompts)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits, seen = DynamicCache(config=model.config), [], 0
    for part in ids.split(chunks, dim=1):
        new = slice(seen, seen + part.shape[1])
        seen = new.stop
        made = model(part, attention_mask=mask[:, :seen], position_ids=positions[:, new], past_key_values=cache)
        logits.append(made.logits)
    for row, prompt in zip(torch.cat(logits, dim=1), prompts, strict=True):
        assert_same(row[-len(prompt) :], model(prompt[None]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_read_by_either_of_its_names(model: RexForCausalLM, name: str) -> None:
    """transformers 5.24 renames it; an older release must not pass over the new name in silence."""
    ids, cache = tokens(1, 9), DynamicCache(config=model.config)
    model(ids[:, :6], **{name: cache})
    assert cache.get_seq_length() == 6
    assert_same(model(ids[:, 6:], **{name: cache}).logits, model(ids).logits[:, 6:])


def test_what_is_no_cache_is_not_passed_over(model: RexForCausalLM) -> None:
    with pytest.raises(TypeError, match="REX takes no argument 'cache'"):
        model(tokens(1, 6), cache="pages")
    assert_same(model(tokens(1, 6), cache=None).logits, model(tokens(1, 6)).logits)


@torch.no_grad()
def test_packed_rows_do_not_see_each_other(model: RexForCausalLM) -> None:
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
    assert_same(packed[:, :5], model(first).logits)
    assert_same(packed[:, 5:], model(second).logits)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree() -> None:
    model, ids = tiny_model().double(), tokens(2, 11)
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    made = model(ids, output_attentions=True, output_hidden_states=True)
    assert_same(made.logits, logits)
    assert [weights.shape for weights in made.attentions] == [(2, 4, 11, 11)] * 2
    assert [states.shape for states in made.hidden_states] == [(2, 11, 32)] * 3


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(model: RexForCausalLM) -> None:
    ids = tokens(2, 10)
    logits = model(ids).logits
    assert_same(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert_same(model(ids, logits_to_keep=torch.tensor([2, 9])).logits, logits[:, [2, 9]])


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids_but_not_beside_them(model: RexForCausalLM) -> None:
    ids = tokens(1, 6)
    embeddings = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeddings)


def test_attention_arguments_reach_a_registered_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[dict[str, Any]] = []

    def recording(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        seen.append({"layer": module.layer_idx, "groups": key.shape[1], "mask": attention_mask, **kwargs})
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=kwargs["scaling"])

    AttentionInterface.register("recording", recording)
    model, ids = tiny_model(), tokens(1, 5)
    expected = model(ids).logits
    model.set_attn_implementation("recording")
    logits = model(ids, position_ids=torch.arange(5)[None], block_table="pages", use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    assert [call["layer"] for call in seen] == [0, 1]
    for call in seen:
        # The engine behind the interface knows its own mask and repeats no heads: it gets what it needs and no more.
        assert (call["block_table"], call["groups"], call["mask"]) == ("pages", 2, None)
        assert call["position_ids"].shape == (1, 5)


def test_the_loss_is_the_cross_entropy_of_the_next_tokens() -> None:
    model, ids = tiny_model(), tokens(3, 9)
    made = model(ids, labels=ids)
    expected = functional.cross_entropy(made.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(made.loss, expected)
    ignored = ids.clone()
    ignored[:, 4:] = -100
    expected = functional.cross_entropy(made.logits[:, :3].flatten(0, 1), ids[:, 1:4].flatten())
    torch.testing.assert_close(model(ids, labels=ignored).loss, expected)


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    # Rows of different length: a mean of the parts' means would weigh a short row's tokens more.
    ids = tokens(4, 10)
    labels = ids.clone()
    labels[0, 3:] = labels[3, 7:] = -100
    whole, parts = tiny_model(), tiny_model()
    targets = labels[:, 1:]
    hand = functional.cross_entropy(whole(ids).logits[:, :-1].flatten(0, 1), targets.flatten())
    hand.backward()
    items = (targets != -100).sum()
    total = 0.0
    for row, label in zip(ids.split(1), labels.split(1), strict=True):
        loss = parts(row, labels=label, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(hand.item(), rel=1e-5)
    for (name, a), b in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    ids = tokens(2, 12)
    plain, saving = tiny_model().train(), tiny_model().train()
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    saving.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once forward, once again for the gradient
    for (name, a), b in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_forward_and_backward_near_float32(dtype: torch.dtype) -> None:
    ids, exact, half = tokens(2, 16), tiny_model(), tiny_model().to(dtype)
    made = half(ids, labels=ids)
    assert made.logits.dtype == dtype
    made.loss.backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    error = (made.logits.float() - exact(ids).logits).std() / exact(ids).logits.std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_casting_the_model_keeps_the_rotary_frequencies_in_float32() -> None:
    model = tiny_model()
    expected = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).model.rotary_emb.inv_freq, expected)
    assert torch.equal(model.half().double().model.rotary_emb.inv_freq, expected)


def compiled_attention(model: RexForCausalLM, **inputs: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Loss of the fully compiled model and the arguments of each attention call in its one graph."""
    calls: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        for node in graph.graph.nodes:
            if node.target is functional.scaled_dot_product_attention:
                calls.append({"key_heads": node.args[1].meta["example_value"].shape[1], **node.kwargs})
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    return compiled(**inputs).loss, calls


@pytest.mark.parametrize("use_cache", [False, None])
def test_the_compiled_model_is_one_graph_that_keeps_the_flash_path(use_cache: bool | None) -> None:
    model, ids = tiny_model().train(), tokens(2, 16)
    loss, calls = compiled_attention(model, input_ids=ids, labels=ids, use_cache=use_cache)
    assert len(calls) == 2
    for call in calls:
        assert (call["attn_mask"], call["is_causal"], call["enable_gqa"]) == (None, True, True)
        assert call["key_heads"] == 2  # key/value heads are not repeated
    loss.backward()
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


def test_the_compiled_model_with_a_padding_mask_is_still_one_graph_and_right() -> None:
    model = tiny_model()
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (4, 9)])
    labels = ids.masked_fill(mask == 0, -100)
    loss, calls = compiled_attention(model, input_ids=ids, attention_mask=mask, labels=labels)
    assert [call["attn_mask"] is not None for call in calls] == [True, True]
    torch.testing.assert_close(loss, model(ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3},
            "hidden_size is 100: expected a multiple of num_attention_heads (3), or set head_dim",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads is 4: expected a multiple of num_key_value_heads (3)",
        ),
        ({"head_dim": 7}, "head_dim is 7: expected an even number, as rotary embeddings rotate pairs"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0: expected a whole number, at least 1 and below 2^31"),
        ({"qk_norm": True}, "qk_norm is True: expected False with post_norm, as no other architecture has both"),
        (
            {"qk_norm": True, "post_norm": False, "partial_rotary_factor": 0.5},
            "qk_norm is True: expected False with partial_rotary_factor, as no other architecture has both",
        ),
        (
            {"head_dim": 6, "partial_rotary_factor": 0.5},
            "partial_rotary_factor rotates 3 of the 6 numbers of a head: expected an even number of them, as "
            + "rotary embeddings rotate pairs",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "rope_type is 'longrope': expected one of default, linear, dynamic, llama3, yarn, whose frequencies do "
            + "not depend on a text's length",
        ),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_in_one_line(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        RexConfig(**shape)
    assert str(refused.value) == message


def test_a_head_dimension_may_be_set_apart_from_the_hidden_size() -> None:
    model = tiny_model(hidden_size=30, head_dim=8)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 30)
    assert model(tokens(1, 4)).logits.shape == (1, 4, VOCAB)


@pytest.mark.parametrize("post_norm", [True, False])
def test_a_branch_starts_no_larger_than_the_embedding_it_is_added_to(post_norm: bool) -> None:
    settings = ModelSettings(hidden_size=64, intermediate_size=96, num_hidden_layers=8, post_norm=post_norm)
    model = build_model(build_config(settings, VOCAB, 0, 0, 1), seed=0)
    sizes = [states.std().item() for states in model(tokens(4, 32), output_hidden_states=True).hidden_states[:-1]]
    assert sizes[0] == pytest.approx(0.02, rel=0.1)
    assert sizes[1] < 2 * sizes[0]  # two branches of the embedding's size, at random angles, make sqrt(3)


def test_without_post_norms_the_branches_shrink_with_depth() -> None:
    model = build_model(RexConfig(vocab_size=VOCAB, num_hidden_layers=8, post_norm=False), seed=0)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert linear.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.input_layernorm.weight.unique().tolist() == [1.0]


def test_the_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny_model(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = tiny_model(seed=3).state_dict(), tiny_model(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_building_the_model(tied: bool) -> None:
    settings = ModelSettings(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_key_value_heads=1, tie_word_embeddings=tied
    )
    attention, mlp, norms = 64 * 64 + 2 * 16 * 64 + 64 * 64, 3 * 64 * 96, 4 * 64
    expected = (1 if tied else 2) * 500 * 64 + 3 * (attention + mlp + norms) + 64
    assert count_config_parameters(build_config(settings, 500, 0, 0, 1)) == expected


@pytest.mark.parametrize("norms", [{}, {"post_norm": False, "qk_norm": True}], ids=["post_norm", "qk_norm"])
def test_every_norm_is_left_out_of_weight_decay_by_its_name(norms: dict[str, bool]) -> None:
    from transformers import Trainer

    decayed = Trainer.get_decay_parameter_names(None, tiny_model(**norms))  # type: ignore[arg-type]
    names = {name for name, _ in tiny_model(**norms).named_parameters()}
    assert {name for name in names if "norm" in name} == names - set(decayed)
    assert len(names - set(decayed)) == 2 * 4 + 1


@torch.no_grad()
def test_norms_of_queries_and_keys_make_attention_blind_to_the_scale_of_their_projections() -> None:
    model = tiny_model(post_norm=False, qk_norm=True)
    before = model(tokens(1, 9)).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(8)
        layer.self_attn.k_proj.weight.mul_(8)
    torch.testing.assert_close(model(tokens(1, 9)).logits, before, rtol=1e-3, atol=1e-3)
