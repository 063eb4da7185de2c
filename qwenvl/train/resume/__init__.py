"""Resuming: settings that changed, the sampler's position, other numbers of ranks."""
