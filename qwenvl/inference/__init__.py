"""Answers and losses of a model: prompts, generation, batches, prediction files."""
