"""A trained model for other engines: files in their formats, and the proof that they hold the same model.

Run: `python -m model.export CHECKPOINT OUT --to hf|gguf|compressed-tensors|all`.
"""
