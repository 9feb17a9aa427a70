"""Exports a trained model to the formats of other engines, and verifies that the exports compute the same model.

Run: `python -m model.export CHECKPOINT OUT --to hf|gguf|compressed-tensors|all`.
"""
