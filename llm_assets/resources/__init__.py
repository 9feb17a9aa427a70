"""Dagster resources of the assets: composed settings, tracking, the BentoML stores, the container engine."""
