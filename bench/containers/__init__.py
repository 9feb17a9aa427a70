"""Benchmarks of the images: size and limits, start time, memory, the composed stack."""
