"""Embeddings counted from the training text, and a training that starts with them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.build import build_config, build_model
from model.text.tokens import TokenDataset
from model.training.checkpoints import local as checkpoints
from model.training.initial import cooccurrence
from model.training.initial.cooccurrence import cooccurrence_embeddings, set_embeddings
from model.training.train import train
from tests.model.training.tiny import experiment


def text(vocab_size: int = 24, length: int = 4000) -> np.ndarray:
    """Tokens 2 k and 2 k + 1 are exchangeable; the last two never occur."""
    draw = np.random.default_rng(0)
    kinds = [0]
    for _ in range(length - 1):
        kinds.append((3 * kinds[-1] + int(draw.integers(0, 3))) % (vocab_size // 2 - 1))
    return (2 * np.array(kinds) + draw.integers(0, 2, length)).astype(np.uint16)


def written_out(tokens: list[int], vocab_size: int) -> np.ndarray:
    counts: Counter[tuple[int, int]] = Counter()
    for place, token in enumerate(tokens):
        for distance, weight in ((1, 1.0), (2, 0.5)):
            if place + distance < len(tokens):
                counts[token, tokens[place + distance]] += weight
                counts[tokens[place + distance], token] += weight
    of_token = [sum(counts[token, other] for other in range(vocab_size)) for token in range(vocab_size)]
    smoothed = [count**0.75 for count in of_token]
    found = np.zeros((vocab_size, vocab_size))
    for (row, context), count in counts.items():
        for one, other in ((row, context), (context, row)):
            found[row, context] += max(math.log(count / of_token[one] / (smoothed[other] / sum(smoothed))), 0) / 2
    return found


def test_the_information_of_pairs_is_that_of_the_definition():
    tokens = text(length=500)
    found_VV = cooccurrence._mutual_information(tokens.astype(np.int64), 24).to_dense()
    np.testing.assert_allclose(found_VV.numpy(), written_out(tokens.tolist(), 24), atol=1e-5)


def test_products_of_embeddings_are_those_of_singular_vectors_times_powers_of_values():
    tokens = text()
    left, values, _ = np.linalg.svd(written_out(tokens.tolist(), 24))
    expected = left[:, :8] * values[:8] ** cooccurrence.POWER
    expected = (expected / np.linalg.norm(expected, axis=1, keepdims=True).clip(1e-6))[:22]
    found_VD = cooccurrence_embeddings(tokens, 24, 8, seed=0)
    np.testing.assert_allclose((found_VD @ found_VD.T)[:22, :22].numpy(), expected @ expected.T, atol=1e-3)
    assert not found_VD[22:].any()


def test_tokens_of_like_surroundings_start_alike():
    found_VD = cooccurrence_embeddings(text(), 24, 8, seed=0)[:22]
    likeness = found_VD @ found_VD.T - 2 * torch.eye(22)
    assert (likeness.argmax(dim=1) == torch.arange(22) ^ 1).all()


def test_the_seed_draws_the_basis_and_the_global_generator_stays():
    state = torch.get_rng_state()
    one, same, other = (cooccurrence_embeddings(text(), 24, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)
    torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-3, rtol=0)


def test_a_vocabulary_smaller_than_the_hidden_size_is_filled_up():
    found_VD = cooccurrence_embeddings(text(), 24, 40, seed=0)
    assert found_VD.shape == (24, 40)
    torch.testing.assert_close(found_VD[:22].norm(dim=1), torch.ones(22))


def test_of_a_long_text_blocks_from_start_to_end_are_counted(monkeypatch):
    monkeypatch.setattr(cooccurrence, "MAX_TOKENS", 40)
    monkeypatch.setattr(cooccurrence, "BLOCK", 10)
    counted = cooccurrence._sample(np.arange(100, dtype=np.uint16))
    assert counted.tolist() == [*range(10), *range(30, 40), *range(60, 70), *range(90, 100)]


def test_embeddings_have_their_scale_and_tokens_without_neighbors_keep_theirs():
    model = build_model(build_config(experiment().model, 24, bos_token_id=0, eos_token_id=0, pad_token_id=1), seed=0)
    before_VD = model.get_input_embeddings().weight.detach().clone()
    set_embeddings(model, cooccurrence_embeddings(text(), 24, 32, seed=0))
    weight_VD = model.get_input_embeddings().weight.detach()
    assert torch.equal(weight_VD[22:], before_VD[22:])
    assert weight_VD[:22].square().mean().sqrt() == pytest.approx(cooccurrence.ROOT_MEAN_SQUARE, rel=1e-4)
    assert model.lm_head.weight.data_ptr() == weight_VD.data_ptr()


@pytest.mark.medium
def test_a_training_starts_with_them_and_resumes_bit_exact(dataset_dir, tmp_path):
    settings = experiment(initial_embeddings="cooccurrence", learning_rate=1e-9)
    train(settings, dataset_dir, tmp_path / "whole", tmp_path / "scratch of the whole")

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch", on_metrics=interrupt)
    assert checkpoints.checkpoint_dir(tmp_path / "scratch", 8).is_dir()
    assert train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch").resumed_from_step == 8
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("output", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    tokens = TokenDataset(dataset_dir, "train", 64).tokens
    expected_VD = cooccurrence_embeddings(tokens, 300, settings.model.hidden_size, settings.training.seed)
    found_VD = one["model.embed_tokens.weight"]
    counted = expected_VD.any(dim=1)
    scale = cooccurrence.ROOT_MEAN_SQUARE * settings.model.hidden_size**0.5
    torch.testing.assert_close(found_VD[counted], scale * expected_VD[counted], atol=1e-4, rtol=0)
