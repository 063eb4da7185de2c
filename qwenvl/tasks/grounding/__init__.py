"""Phrase grounding (F-LMM): segmentation masks from attention."""
