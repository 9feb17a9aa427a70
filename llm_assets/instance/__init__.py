"""The Dagster instance and the servers beside it: its home, its run launcher, the tracking server."""
