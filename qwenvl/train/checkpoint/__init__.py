"""Checkpoints: the trainer that writes them, their folders, manifests and weight files."""
