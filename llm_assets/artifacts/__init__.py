"""Artifacts on disk or in an object store: manifest, store, Dagster IO manager."""
