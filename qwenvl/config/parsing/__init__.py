"""Parsing of command lines and recipe files into the dataclasses of the settings."""
