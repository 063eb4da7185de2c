"""Resuming: changed settings, the sampler's position, another number of ranks."""
