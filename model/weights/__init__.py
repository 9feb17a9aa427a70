"""Weights: loading, int8, int4 and packed layers, quantization, export."""
