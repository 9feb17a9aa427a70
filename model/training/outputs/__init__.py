"""Output files of a training: checkpoint files, model card, curves, summary."""
