"""Command-line tools; each is run as ``python tools/NAME.py`` and can be imported for its library function."""
