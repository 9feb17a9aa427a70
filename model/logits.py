"""How many rows of logits exist at a time, in training and evaluation; the label of tokens that are not predicted."""

import torch

IGNORE_INDEX = -100
"""Label of a token that is not predicted: Hugging Face's number."""
# Float32 logits held at once: as much as fits a CPU's cache, and enough rows to occupy a GPU.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES, 16 at least."""
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
