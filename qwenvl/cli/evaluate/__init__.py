"""Parts of tools/evaluate.py: its scores, tables and page."""
