"""Experiments: composing settings with Hydra, partitions, sweeps, references to artifacts."""
