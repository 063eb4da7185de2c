"""Rank samples by how suspect they are, and write lists to train on and a page to look at."""
