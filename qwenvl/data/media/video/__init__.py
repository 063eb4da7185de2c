"""Videos: containers, decoders, animations, frames by their real times."""
