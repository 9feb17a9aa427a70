"""Weights: loading, int8 and packed layers, quantization, export."""
