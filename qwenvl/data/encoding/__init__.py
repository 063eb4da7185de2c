"""Text and media grids to input ids, labels and M-RoPE positions."""
