"""Boxes and points: their written forms, and their conversion to the form of the family."""
