"""Grammars that an answer must match: regular expressions, choices, JSON schemas, and finite languages of tokens."""
