"""Parts of tools/check_image.py: the checks, the files they write and the table."""
