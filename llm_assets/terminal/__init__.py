"""The display of runs in a terminal: one line per stage while it runs, tables at the end."""
