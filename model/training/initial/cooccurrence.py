"""Initial embeddings from which tokens occur near which in the training text.

Tokens of like surroundings start with like embeddings, so the first steps learn how kinds of tokens follow one another
instead of which tokens are of a kind. Architecture and files stay as they are.
Legend: `N` tokens of the text, `V` vocabulary, `D` hidden size.
"""

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.modeling_rex import RexForCausalLM

MAX_TOKENS = 2**22
"""Tokens that are counted; of a longer text BLOCK tokens at a time, evenly spread over it."""
BLOCK = 2**14
WEIGHTS = (1.0, 0.5)
"""Of a pair of neighbors, and of a pair with one token between them."""
SMOOTHING = 0.75
"""Exponent on the counts of contexts (word2vec's), without which rare ones would count too much."""
POWER = 1.5
"""Exponent on the singular values; of 0.25 to 2.5, it left the fewest bits per byte (`bench/LOG.md`)."""
ROOT_MEAN_SQUARE = 0.2
"""Of the elements of an embedding that is set; the scale of random ones learned more slowly (`bench/LOG.md`)."""
_OVERSAMPLED = 16


def cooccurrence_embeddings(tokens_N: npt.NDArray[np.integer], vocab_size: int, size: int, seed: int) -> Tensor:
    """Embeddings with rows of norm 1, (V, D) in float32; those of tokens that have no neighbors are 0.

    The leading D singular vectors of the positive pointwise mutual information of tokens near each other, scaled by a
    power of their singular values (Levy, Goldberg and Dagan 2015, https://aclanthology.org/Q15-1016), in a basis that
    `seed` draws, so that all dimensions are alike. tokens_N: the training text, N >= 2.
    """
    information_VV = _mutual_information(_sample(tokens_N), vocab_size)
    kept = min(size, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_VD, values_D, _ = torch.svd_lowrank(information_VV, min(kept + _OVERSAMPLED, vocab_size), niter=4)
        basis_DD = torch.linalg.qr(torch.randn(size, size))[0]
    found_VD = (left_VD[:, :kept] * values_D[:kept] ** POWER) @ basis_DD[:kept]
    norm_V1 = found_VD.norm(dim=1, keepdim=True)
    return torch.where(norm_V1 > 1e-6, found_VD / norm_V1.clamp(min=1e-6), 0.0)


@torch.no_grad()
def set_embeddings(model: RexForCausalLM, rows_VD: Tensor) -> None:
    """Set the embeddings to `rows_VD`, of norm 1, with elements of ROOT_MEAN_SQUARE; where a row is 0 they stay."""
    weight_VD = model.model.embed_tokens.weight
    scaled_VD = rows_VD * ROOT_MEAN_SQUARE * weight_VD.shape[1] ** 0.5
    weight_VD.copy_(torch.where(rows_VD.any(dim=1, keepdim=True), scaled_VD, weight_VD))


def _sample(tokens_N: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if len(tokens_N) <= MAX_TOKENS:
        return np.asarray(tokens_N, np.int64)
    starts = np.linspace(0, len(tokens_N) - BLOCK, MAX_TOKENS // BLOCK).astype(np.int64)
    return np.concatenate([tokens_N[start : start + BLOCK] for start in starts]).astype(np.int64)


def _mutual_information(tokens_N: npt.NDArray[np.int64], vocab_size: int) -> Tensor:
    """The mean of log(count * total / (row * context)), where positive, with each of the two as the context.

    Symmetric, (V, V), sparse in CSR, whose products take a fifth of the time of COO's.
    """
    pairs, weights = [], []
    for distance, weight in enumerate(WEIGHTS, start=1):
        found, times = np.unique(tokens_N[:-distance] * vocab_size + tokens_N[distance:], return_counts=True)
        first, second = np.divmod(found, vocab_size)
        pairs += [found, second * vocab_size + first]
        weights += [times * weight] * 2
    both, index = np.unique(np.concatenate(pairs), return_inverse=True)
    counts = np.bincount(index, np.concatenate(weights))
    first, second = np.divmod(both, vocab_size)
    of_rows = np.bincount(first, counts, vocab_size)
    contexts = of_rows**SMOOTHING
    contexts /= contexts.sum()
    values = sum(
        np.maximum(np.log(counts / (of_rows[row] * contexts[context])), 0) / 2
        for row, context in ((first, second), (second, first))
    )
    starts = torch.from_numpy(np.searchsorted(first, np.arange(vocab_size + 1)))
    columns, data = torch.from_numpy(second), torch.from_numpy(np.asarray(values, np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, data, (vocab_size, vocab_size), check_invariants=True)
