"""Data, model and packing of a run, built from its settings."""
