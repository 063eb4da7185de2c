"""Lengths without decoding, kept on disk; bin packing; the plan of an epoch."""
