"""The dry run: what a run would do, its steps, tokens, hours and memory, without training."""
