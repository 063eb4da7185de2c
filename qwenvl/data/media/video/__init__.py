"""Videos: containers, decoders and animations; frames with their real times."""
