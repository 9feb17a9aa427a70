"""The benchmark report that the pipeline makes: what is scored, timed and drawn, and how it is written."""
