"""What is learned: language modelling, heads, grounding; one folder each, behind one seam (objective.py)."""
