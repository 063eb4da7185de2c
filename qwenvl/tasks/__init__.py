"""Training objectives: language modelling, heads and grounding, all behind the interface in ``objective.py``."""
