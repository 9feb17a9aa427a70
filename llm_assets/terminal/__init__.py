"""What a person sees of a run in a terminal: one line per stage while it works, tables at the end."""
