"""Classification, regression and other heads on pooled hidden states."""
