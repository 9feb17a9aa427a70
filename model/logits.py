"""Logits a chunk of rows at a time, in training and in evaluation alike; the label of tokens that are not predicted."""

import torch

IGNORED = -100
"""Label of a token that is not predicted: Hugging Face's number."""
# Float32 logits held at once: what a processor's cache takes, and what keeps a GPU busy.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES, 16 at least."""
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
