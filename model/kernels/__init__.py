"""Hand-written kernels of a training: attention in blocks, cross entropy in chunks, norms and rotary embeddings."""
