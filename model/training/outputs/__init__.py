"""What a training leaves behind: checkpoint files, model card, curves, summary."""
