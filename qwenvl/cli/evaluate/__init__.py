"""Parts of tools/evaluate.py: its tables and its page."""
