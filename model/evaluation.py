"""How well a model predicts held-out text: loss, perplexity, bits per byte, and agreement of two models.

Bits per byte do not depend on the tokenizer, so models with different vocabularies compare. Everything is computed
from the windows of a TokenDataset in float64 sums; a chunk of logits at a time, as in training (training/loss.py), so
that memory does not grow with the vocabulary.
Legend: `B` windows in a batch, `T` tokens of a window, `D` hidden size, `R` rows (predicted tokens), `V` vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.errors import PipelineError
from model.logits import IGNORE_INDEX, rows_at_once
from model.modeling_rex import RexForCausalLM
from model.progress import Log, Progress, silent
from model.system.cpu import limit_threads
from model.text.tokens import TokenDataset


@dataclass
class Evaluation:
    """What a model scored on held-out text."""

    loss: float
    """Mean negative log-likelihood, nats per predicted token."""
    bits_per_byte: float
    perplexity: float
    tokens: int
    """Tokens predicted."""
    bytes: int
    """Bytes of text that those tokens stand for."""


@dataclass
class Agreement:
    """How closely a model follows a reference on the same text."""

    top1_agreement: float
    """Share of positions, 0 to 1, at which both find the same token most likely."""
    kl_divergence: float
    """Mean KL(reference || model), nats per token."""


@torch.no_grad()  # not inference_mode: what the model caches under it could not be used in training again
def evaluate(
    model: RexForCausalLM,
    dataset: TokenDataset,
    *,
    batch_size: int = 4,
    max_windows: int | None = None,
    log: Log = silent,
) -> Evaluation:
    """Loss and bits per byte of `model` on a split.

    max_windows: evaluate so many windows, evenly spread and always the same; None for the whole split, in which every
    token but the first is predicted exactly once (the last, shorter window included).
    bits_per_byte = sum of the predicted tokens' nats / ln 2 / the bytes that those tokens stand for. An end-of-text
    token stands for 0 bytes and its cost counts: it is the cost of telling where a document ends.
    Raises PipelineError where there is nothing to predict.
    """
    limit_threads()
    progress = Progress(log, "evaluation", sum(_count(dataset, max_windows)), "windows")
    byte_counts_V = torch.from_numpy(dataset.byte_counts)
    nats, tokens, text_bytes = 0.0, 0, 0
    for labels_BT, (hidden_BTD,) in _forward([model], _batches(dataset, batch_size, max_windows)):
        labels_BT = labels_BT[:, 1:]
        counted = labels_BT != IGNORE_INDEX  # only the responses of conversations count
        labels_R = labels_BT[counted]
        for start, (logits_RV,) in _chunks([model], [hidden_BTD[:, :-1][counted.to(hidden_BTD.device)]]):
            targets = labels_R[start : start + len(logits_RV)].to(logits_RV.device)
            nats += functional.cross_entropy(logits_RV, targets, reduction="none").double().sum().item()
        tokens += len(labels_R)
        text_bytes += int(byte_counts_V[labels_R].sum())
        progress.advance(len(labels_BT))
    if text_bytes == 0:
        raise PipelineError("the evaluated windows hold no text: expected at least one byte; use a larger corpus")
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        bits_per_byte=nats / math.log(2) / text_bytes,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        tokens=tokens,
        bytes=text_bytes,
    )


@torch.no_grad()
def window_bits(model: RexForCausalLM, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """Bits that each window costs, in order: of its predicted tokens, those whose label is IGNORE_INDEX left out.

    batches: token ids and labels, each (B, T), as a TokenDataset gives them; the first token of a window is not
    predicted.
    """
    bits: list[float] = []
    for labels_BT, (hidden_BTD,) in _forward([model], batches):
        for labels_T, hidden_TD in zip(labels_BT[:, 1:], hidden_BTD[:, :-1], strict=True):
            counted = labels_T != IGNORE_INDEX
            labels_R, nats = labels_T[counted], 0.0
            for start, (logits_RV,) in _chunks([model], [hidden_TD[counted.to(hidden_TD.device)]]):
                targets = labels_R[start : start + len(logits_RV)].to(logits_RV.device)
                nats += functional.cross_entropy(logits_RV, targets, reduction="none").double().sum().item()
            bits.append(nats / math.log(2))
    return bits


@torch.no_grad()
def compare(
    model: RexForCausalLM,
    reference: RexForCausalLM,
    dataset: TokenDataset,
    *,
    max_windows: int | None,
    batch_size: int = 4,
) -> Agreement:
    """How closely `model` follows `reference` on the windows that `evaluate` would take."""
    limit_threads()
    same, divergence, tokens = 0, 0.0, 0
    models = [model, reference]
    for _, states in _forward(models, _batches(dataset, batch_size, max_windows)):
        for _, (logits_RV, expected_RV) in _chunks(models, [hidden[:, :-1].flatten(0, 1) for hidden in states]):
            log_q_RV = functional.log_softmax(logits_RV, dim=-1)
            log_p_RV = functional.log_softmax(expected_RV.to(log_q_RV.device), dim=-1)
            same += int((log_q_RV.argmax(-1) == log_p_RV.argmax(-1)).sum())
            divergence += (log_p_RV.exp() * (log_p_RV - log_q_RV)).double().sum().item()
            tokens += len(log_q_RV)
    return Agreement(top1_agreement=same / tokens, kl_divergence=divergence / tokens)


def _count(dataset: TokenDataset, max_windows: int | None) -> tuple[int, bool]:
    """Whole windows to evaluate, and whether the shorter one at the split's end is one of them."""
    whole = len(dataset)
    if dataset.responses is not None:
        return min(max_windows or whole, whole), False
    if max_windows is not None and max_windows <= whole:
        return max_windows, False
    return whole, len(dataset.tokens) - whole * (dataset.sequence_length - 1) > 1


def _batches(dataset: TokenDataset, batch_size: int, max_windows: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels of the windows, each (B, T), read from disk as they are needed."""
    count, has_tail = _count(dataset, max_windows)
    if count == 0 and not has_tail:
        raise PipelineError("the split has no token to predict: expected at least 2 tokens; use a larger corpus")
    for start in range(0, count, batch_size):
        indices = [i * len(dataset) // count for i in range(start, min(start + batch_size, count))]
        windows = [dataset[i] for i in indices]
        yield torch.stack([w["input_ids"] for w in windows]), torch.stack([w["labels"] for w in windows])
    if has_tail:
        tail = dataset.tokens[len(dataset) * (dataset.sequence_length - 1) :]
        ids_1T = torch.from_numpy(tail.astype("int64")).unsqueeze(0)
        yield ids_1T, ids_1T


def _forward(
    models: list[RexForCausalLM], batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(labels (B, T), each model's final hidden states (B, T, D)) per batch; leaves the models in the mode they were
    in.
    """
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        for ids_BT, labels_BT in batches:
            inputs = ((m.model, ids_BT.to(m.device)) for m in models)
            yield labels_BT, [decoder(input_ids=ids, use_cache=False).last_hidden_state for decoder, ids in inputs]
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _chunks(models: list[RexForCausalLM], states: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """(first row, each model's float32 logits (rows, V)) for the same rows of each model's hidden states (R, D)."""
    rows = min(rows_at_once(m.config.vocab_size, m.device) for m in models)
    for start in range(0, len(states[0]), rows):
        pairs = zip(models, states, strict=True)
        yield start, [model.lm_head(hidden_RD[start : start + rows]).float() for model, hidden_RD in pairs]
