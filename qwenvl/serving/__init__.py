"""Comparison of what a server gives the model with what training gave it, and the server's arguments."""
