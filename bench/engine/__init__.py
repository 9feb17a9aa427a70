"""Comparison of the generation engine with its alternatives: workloads, contenders, interleaved rounds."""
