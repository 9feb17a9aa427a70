"""How well a model predicts held-out text: loss, perplexity, bits per byte, and agreement of two models.

Bits per byte do not depend on the tokenizer, so models with different vocabularies compare. Everything is computed
from the windows of a TokenDataset in float64 sums; a chunk of logits at a time, as in training (training/loss.py), so
that memory does not grow with the vocabulary.
Legend: `B` windows in a batch, `T` tokens of a window, `D` hidden size, `R` rows (predicted tokens), `V` vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import PipelineError
from model.logits import IGNORE_INDEX, rows_at_once
from model.modeling_rex import RexForCausalLM
from model.progress import Log, Progress, silent
from model.system.cpu import limit_threads
from model.text.tokens import TokenDataset


@dataclass
class Evaluation:
    """Scores of a model on held-out text."""

    loss: float
    """Mean negative log-likelihood, nats per predicted token."""
    bits_per_byte: float
    perplexity: float
    tokens: int
    """Tokens predicted."""
    bytes: int
    """Bytes of text that those tokens stand for."""


@dataclass
class MixtureEvaluation(Evaluation):
    """Scores of a model on held-out text of several sources."""

    sources: dict[str, Evaluation]
    """The scores on the windows of each source that has some."""


def scores_of_sources(found: Evaluation) -> dict[str, Evaluation]:
    """The scores by source; empty if the text is not a mixture."""
    return found.sources if isinstance(found, MixtureEvaluation) else {}


@dataclass
class Agreement:
    """How closely a model follows a reference on the same text."""

    top1_agreement: float
    """Share of positions, 0 to 1, at which both find the same token most likely."""
    kl_divergence: float
    """Mean KL(reference || model), nats per token."""


class Predictor(Protocol):
    """Computes the logits to evaluate: of a model, or of a step of the engine (`generation/steps/predictor.py`)."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def device(self) -> torch.device:
        """Device of the logits."""

    def logits(self, ids_BT: Tensor, selected_BT: Tensor, rows: int) -> Iterator[Tensor]:
        """Logits (rows, V), float32, of the token after each selected one, window by window; the last may have fewer.

        selected_BT: bool, (B, T - 1): the last token of a window has no next one to predict.
        """


class ModelPredictor:
    """A model in evaluation mode: one forward pass per batch, and its head over `rows` rows at a time."""

    def __init__(self, model: RexForCausalLM) -> None:
        self._model = model
        self.vocab_size: int = model.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._model.device

    def logits(self, ids_BT: Tensor, selected_BT: Tensor, rows: int) -> Iterator[Tensor]:
        """As `Predictor.logits`; leaves the model in the mode it was in."""
        model, mode = self._model, self._model.training
        model.eval()
        try:
            hidden_BTD = self._final_hidden(ids_BT.to(model.device))
            hidden_RD = hidden_BTD[:, :-1][selected_BT.to(hidden_BTD.device)]
            for start in range(0, len(hidden_RD), rows):
                yield model.lm_head(hidden_RD[start : start + rows]).float()
        finally:
            model.train(mode)

    def _final_hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, T, D)."""
        hidden_BTD: Tensor = self._model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD


def as_predictor(model: "RexForCausalLM | Predictor") -> Predictor:
    """A predictor for a model; a predictor stays as it is."""
    return ModelPredictor(model) if isinstance(model, nn.Module) else model  # type: ignore[arg-type, return-value]


@torch.no_grad()  # not inference_mode: tensors that the model caches under it could not be used in training again
def evaluate(
    model: RexForCausalLM | Predictor,
    dataset: TokenDataset,
    *,
    batch_size: int = 4,
    max_windows: int | None = None,
    log: Log = silent,
) -> Evaluation:
    """Loss and bits per byte of `model` on a split.

    max_windows: evaluate this many windows, evenly spread and always the same; None for the whole split, in which every
    token but the first is predicted exactly once (the last, shorter window included).
    bits_per_byte = sum of the predicted tokens' nats / ln 2 / the bytes that those tokens stand for. An end-of-text
    token stands for 0 bytes and its cost counts: it is the cost of predicting where a document ends.
    Of a mixture, a MixtureEvaluation. Raises PipelineError if there is nothing to predict.
    """
    limit_threads()
    predictor = as_predictor(model)
    progress = Progress(log, "evaluation", sum(_count(dataset, max_windows)), "windows")
    byte_counts_V = torch.from_numpy(dataset.byte_counts)
    nats, tokens, text_bytes = 0.0, 0, 0
    of_sources = _SourceSums(dataset, batch_size, max_windows) if dataset.sources else None
    for ids_BT, labels_BT in _batches(dataset, batch_size, max_windows):
        labels_R, nats_R = _nats(predictor, ids_BT, labels_BT)
        nats += sum(part.sum().item() for part in nats_R)
        tokens += len(labels_R)
        text_bytes += int(byte_counts_V[labels_R].sum())
        if of_sources:
            of_sources.add((labels_BT[:, 1:] != IGNORE_INDEX).sum(dim=1), nats_R, byte_counts_V[labels_R])
        progress.advance(len(labels_BT))
    if text_bytes == 0:
        raise PipelineError("the evaluated windows hold no text: expected at least one byte; use a larger corpus")
    whole = _evaluation(nats, tokens, text_bytes)
    return MixtureEvaluation(**vars(whole), sources=of_sources.evaluations()) if of_sources else whole


def _evaluation(nats: float, tokens: int, text_bytes: int) -> Evaluation:
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        bits_per_byte=nats / math.log(2) / text_bytes,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        tokens=tokens,
        bytes=text_bytes,
    )


class _SourceSums:
    """Sums of an evaluation by source: nats, tokens and bytes."""

    def __init__(self, dataset: TokenDataset, batch_size: int, max_windows: int | None) -> None:
        assert dataset.sources is not None
        count, has_tail = _count(dataset, max_windows)
        sources = torch.from_numpy(dataset.window_sources())
        spread = torch.tensor([i * len(dataset) // count for i in range(count)], dtype=torch.int64)
        batches = list(sources[spread].split(batch_size)) if count else []
        if has_tail:
            last = [len(dataset) * (dataset.sequence_length - 1)]
            batches.append(torch.from_numpy(dataset.sources.of_tokens(np.array(last))))
        self._names, self._batches = dataset.sources.names, iter(batches)
        self._sums = torch.zeros((len(self._names), 3), dtype=torch.float64)

    def add(self, counts_B: Tensor, nats_R: list[Tensor], bytes_R: Tensor) -> None:
        """Add the next batch. counts_B: predicted tokens of each window."""
        source_R = next(self._batches).repeat_interleave(counts_B)
        nats = torch.cat([torch.zeros(0, dtype=torch.float64), *nats_R])
        values = torch.stack([nats, torch.ones_like(nats), bytes_R.double()], dim=1)
        self._sums.index_add_(0, source_R, values)

    def evaluations(self) -> dict[str, Evaluation]:
        """The scores of each source with text."""
        return {
            name: _evaluation(nats, int(tokens), int(size))
            for name, (nats, tokens, size) in zip(self._names, self._sums.tolist(), strict=True)
            if size
        }


@torch.no_grad()
def window_bits(model: RexForCausalLM | Predictor, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """Bits that each window costs, in order: of its predicted tokens, those whose label is IGNORE_INDEX left out.

    batches: token ids and labels, each (B, T), as a TokenDataset gives them; the first token of a window is not
    predicted.
    """
    predictor, bits = as_predictor(model), []
    for ids_BT, labels_BT in batches:
        _, nats = _nats(predictor, ids_BT, labels_BT)
        counts = (labels_BT[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
        nats_R = torch.cat([torch.zeros(0, dtype=torch.float64), *nats])
        bits += [part.sum().item() / math.log(2) for part in nats_R.split(counts)]
    return bits


@torch.no_grad()
def compare(
    model: RexForCausalLM | Predictor,
    reference: RexForCausalLM | Predictor,
    dataset: TokenDataset,
    *,
    max_windows: int | None,
    batch_size: int = 4,
) -> Agreement:
    """How closely `model` follows `reference` on the windows that `evaluate` would take."""
    limit_threads()
    same, divergence, tokens = 0, 0.0, 0
    first, second = as_predictor(model), as_predictor(reference)
    rows = min(rows_at_once(each.vocab_size, each.device) for each in (first, second))
    for ids_BT, _ in _batches(dataset, batch_size, max_windows):
        every_BT = torch.ones_like(ids_BT[:, 1:], dtype=torch.bool)
        pairs = zip(first.logits(ids_BT, every_BT, rows), second.logits(ids_BT, every_BT, rows), strict=True)
        for logits_RV, expected_RV in pairs:
            log_q_RV = functional.log_softmax(logits_RV, dim=-1)
            log_p_RV = functional.log_softmax(expected_RV.to(log_q_RV.device), dim=-1)
            same += int((log_q_RV.argmax(-1) == log_p_RV.argmax(-1)).sum())
            divergence += (log_p_RV.exp() * (log_p_RV - log_q_RV)).double().sum().item()
            tokens += len(log_q_RV)
    return Agreement(top1_agreement=same / tokens, kl_divergence=divergence / tokens)


def _nats(predictor: Predictor, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Labels (R,) of the tokens that count (in conversations, those of answers), and their nats, float64, in parts."""
    counted_BT = labels_BT[:, 1:] != IGNORE_INDEX
    labels_R, nats, start = labels_BT[:, 1:][counted_BT], [], 0
    for logits_RV in predictor.logits(ids_BT, counted_BT, rows_at_once(predictor.vocab_size, predictor.device)):
        targets_R = labels_R[start : start + len(logits_RV)].to(logits_RV.device)
        nats.append(functional.cross_entropy(logits_RV, targets_R, reduction="none").double().cpu())
        start += len(logits_RV)
    return labels_R, nats


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
