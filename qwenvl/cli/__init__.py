"""Commands: ``qwenvl NAME``, or ``python tools/NAME.py``; each module can be imported for its library function."""
