"""JSON and JSON Lines: rows by offset, their index, and the first mistake of a file."""
