"""Data: sections of recipes, sources, rows, tokens."""
