"""Command line and recipe files to the dataclasses of the settings."""
