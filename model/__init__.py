"""REX: the decoder, its text pipeline, its training, its quantization and its generation engine.

Nothing here knows an orchestrator, a tracker or a web server. Importing this package imports neither torch nor
transformers, so that `model.settings` and `model.errors` are cheap to use from a Dagster code location.
"""
