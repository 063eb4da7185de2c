"""Losses of language models over the trained tokens."""
