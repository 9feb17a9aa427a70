"""The six assets, one module each."""
