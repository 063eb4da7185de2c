"""Finished folders: verification in a fresh process, model card, upload."""
