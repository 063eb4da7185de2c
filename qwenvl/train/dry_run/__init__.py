"""Dry run: compute steps, tokens, hours and memory of a run without training."""
