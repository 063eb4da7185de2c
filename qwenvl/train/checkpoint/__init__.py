"""Checkpoints: their folders, manifests and weight files."""
