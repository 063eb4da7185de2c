"""The vision tower: one call for all images and videos of a batch."""
