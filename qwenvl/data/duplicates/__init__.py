"""Find samples that are nearly the same, within and across datasets, and training samples that evaluation shows."""
