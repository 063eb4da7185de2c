"""Generation and evaluation with trained folders."""
