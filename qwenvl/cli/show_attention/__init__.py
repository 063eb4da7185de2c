"""Parts of the page of tools/show_attention.py."""
