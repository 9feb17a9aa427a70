"""Starts a training in one process or many, of one host or several, all of which end together."""
