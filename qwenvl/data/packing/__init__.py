"""Lengths without decoding and their cache on disk; packing plans; packed annotation files."""
