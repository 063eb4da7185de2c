"""Losses of language models over the rows that are trained."""
