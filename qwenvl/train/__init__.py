"""Training: the Trainer, its batches and checkpoints, and the entry point."""
