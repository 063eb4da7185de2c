"""The command ``advise``: which settings train a model on given GPUs, with memory by part, steps and hours."""
