import math
from pathlib import Path

import pytest
import torch

from model.build import build_config, build_model
from model.evaluation import compare, evaluate
from model.logits import CHUNK_BYTES
from model.modeling_rex import RexForCausalLM
from model.text.tokens import TokenDataset
from tests.model.training.tiny import TOKENIZER, experiment, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    directory: Path = make_dataset(tmp_path_factory.mktemp("evaluation"))
    return TokenDataset(directory, "validation", TOKENIZER.sequence_length)


def make_model(seed: int) -> RexForCausalLM:
    config = build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return build_model(config, seed)


def nats_by_hand(model: RexForCausalLM, ids_T: torch.Tensor) -> list[float]:
    """Negative log-likelihood of each token but the first."""
    with torch.no_grad():
        logits_TV = model.eval()(input_ids=ids_T[None]).logits[0].double()
    return [(logits_TV[t].logsumexp(-1) - logits_TV[t, ids_T[t + 1]]).item() for t in range(len(ids_T) - 1)]


def test_the_loss_is_the_one_computed_by_hand(dataset):
    model = make_model(0)
    windows = [dataset[i * len(dataset) // 3]["input_ids"] for i in range(3)]
    nats = [value for window in windows for value in nats_by_hand(model, window)]
    text_bytes = sum(int(dataset.byte_counts[token]) for window in windows for token in window[1:].tolist())
    result = evaluate(model, dataset, batch_size=2, max_windows=3)
    assert result.tokens == len(nats) == 3 * 63
    assert result.bytes == text_bytes
    assert result.loss == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_the_whole_split_counts_every_token_and_byte_but_the_first_once(dataset):
    result = evaluate(make_model(0), dataset)
    assert result.tokens == len(dataset.tokens) - 1
    assert result.bytes == len(dataset.text_bytes(1, len(dataset.tokens)))


def test_the_batch_size_does_not_change_the_score(dataset):
    model = make_model(0)
    scores = [evaluate(model, dataset, batch_size=size, max_windows=7).loss for size in (1, 3, 7)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_a_model_in_training_mode_is_scored_without_dropout_and_stays_in_it(dataset):
    model = make_model(0)
    expected = evaluate(model, dataset, max_windows=2)
    model.train()
    assert evaluate(model, dataset, max_windows=2) == expected
    assert model.training


def test_a_model_agrees_with_itself(dataset):
    agreement = compare(make_model(0), make_model(0), dataset, max_windows=2)
    assert agreement.top1_agreement == 1
    assert agreement.kl_divergence == 0


def test_agreement_is_the_one_computed_by_hand(dataset):
    model, reference = make_model(1).eval(), make_model(0).eval()
    windows_BT = torch.stack([dataset[i * len(dataset) // 2]["input_ids"] for i in range(2)])
    with torch.no_grad():
        q = model(input_ids=windows_BT).logits[:, :-1].double().softmax(-1)
        p = reference(input_ids=windows_BT).logits[:, :-1].double().softmax(-1)
    agreement = compare(model, reference, dataset, max_windows=2)
    assert agreement.kl_divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert agreement.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert agreement.kl_divergence > 0


def test_chunks_of_logits_give_the_score_of_whole_ones_and_bound_the_memory(dataset, monkeypatch):
    model, reference = make_model(1), make_model(0)
    whole = evaluate(model, dataset, max_windows=3), compare(model, reference, dataset, max_windows=3)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: rows.append(len(logits)))
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 16 * 4 * model.config.vocab_size)
    chunked = evaluate(model, dataset, max_windows=3), compare(model, reference, dataset, max_windows=3)
    assert max(rows) == 16
    assert vars(chunked[0]) == pytest.approx(vars(whole[0]), rel=1e-9)
    assert vars(chunked[1]) == pytest.approx(vars(whole[1]), rel=1e-6)
