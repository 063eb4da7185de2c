"""Images and videos: location, headers to sizes and token counts, decoding and resizing."""
