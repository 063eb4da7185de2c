"""Attention within the borders of packed samples, and attention maps."""
