"""A tiny model that answers with or without a thought, as it is asked."""
