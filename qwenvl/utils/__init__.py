"""Helpers for all layers: errors, logging, ranks, caches and processes."""
