"""The parts of tools/check_image.py."""
