"""A tiny model that answers with or without a thinking block, depending on the prompt."""
