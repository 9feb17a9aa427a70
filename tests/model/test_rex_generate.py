"""`generate()` of transformers on REX: the reference that the serving engine is held to."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import ContinuousBatchingConfig

from model.modeling_rex import RexForCausalLM
from tests.model.test_modeling_rex import VOCAB, left_pad, tiny_model, tokens

NEW = 12


@pytest.fixture(scope="module")
def model() -> RexForCausalLM:
    made = tiny_model().double()
    made.generation_config.eos_token_id = None  # an untrained model stops anywhere
    return made


@torch.no_grad()
def greedy(model: RexForCausalLM, ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
    """Greedy decoding written out, without a cache."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def log_likelihood(model: RexForCausalLM, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Nats of the tokens after the prompt, shape (B,)."""
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, prompt - 1 :].sum(-1)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic cache", "no cache", "static cache"],
)
def test_greedy_decoding_follows_the_uncached_logits(model: RexForCausalLM, options: dict) -> None:
    ids = tokens(2, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **options), greedy(model, ids))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(model: RexForCausalLM, options: dict) -> None:
    prompts = [tokens(1, n, seed=n)[0] for n in (2, 9, 5)]
    ids, mask = left_pad(prompts)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row[-NEW - len(prompt) :], greedy(model, prompt[None])[0])


def test_sampling_draws_from_the_models_distribution(model: RexForCausalLM) -> None:
    ids = tokens(1, 4)
    torch.manual_seed(0)
    drawn = model.generate(ids.expand(6000, -1), max_new_tokens=1, do_sample=True)[:, -1]
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1)
    found = drawn.bincount(minlength=VOCAB) / 6000
    assert (found - expected).abs().sum() / 2 < 0.06  # the noise of 6,000 draws from 67 tokens is about 0.04
    again = []
    for _ in range(2):
        torch.manual_seed(1)
        again.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=10, top_p=0.9, temperature=0.8))
    assert torch.equal(*again)


def test_beam_search_finds_a_likelier_text_than_greedy(model: RexForCausalLM) -> None:
    ids = tokens(3, 4, seed=5)
    beams = model.generate(ids, max_new_tokens=6, num_beams=VOCAB, do_sample=False, length_penalty=0.0)
    gain = log_likelihood(model, beams, 4) - log_likelihood(model, greedy(model, ids, 6), 4)
    assert gain.min() > -1e-4 and gain.max() > 0.1


def test_beam_search_is_exhaustive_over_two_tokens_with_a_beam_per_token(model: RexForCausalLM) -> None:
    ids = tokens(1, 4, seed=7)
    first = torch.arange(VOCAB).repeat_interleave(VOCAB)
    every = torch.cat((ids.expand(VOCAB**2, -1), first[:, None], torch.arange(VOCAB).repeat(VOCAB)[:, None]), dim=1)
    likeliest = every[log_likelihood(model, every, 4).argmax()]
    found = model.generate(ids, max_new_tokens=2, num_beams=VOCAB, do_sample=False, length_penalty=0.0)[0]
    assert torch.equal(found, likeliest)


def test_a_conversation_continues_from_its_cache(model: RexForCausalLM) -> None:
    ids, cache = tokens(1, 6), DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat((first, tokens(1, 3, seed=9)), dim=1)
    second = model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(second, greedy(model, longer, 4))


def test_generation_stops_at_the_end_of_text_token_and_pads_the_rest() -> None:
    model = tiny_model().double()
    free = greedy(model, tokens(2, 5))[:, 5:]
    stop = int(free[0, 2])
    model.generation_config.eos_token_id = stop
    made = model.generate(tokens(2, 5), max_new_tokens=NEW, do_sample=False)[0, 5:]
    end = free[0].tolist().index(stop) + 1
    assert made[:end].tolist() == free[0, :end].tolist()
    assert set(made[end:].tolist()) <= {model.config.pad_token_id}


@pytest.mark.medium
def test_continuous_batching_of_transformers_runs_rex() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 8, 5)]
    expected = [greedy(model, torch.tensor([p]), 6)[0, len(p) :].tolist() for p in prompts]
    config = model.generation_config
    config.max_new_tokens, config.do_sample, config.eos_token_id = 6, False, -1
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=4, max_batch_tokens=32, use_async_batching=False)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages)
    assert [results[name].generated_tokens for name in sorted(results)] == expected
