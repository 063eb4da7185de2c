"""JSON and JSON Lines: rows by offset, their index, and the first syntax error of a file."""
