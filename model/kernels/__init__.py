"""Hand-written kernels of a training: attention in blocks and cross entropy in chunks, with their own gradients."""
