"""The step for CUDA GPUs: Triton kernels, and CUDA graphs that launch all of a step at once."""
