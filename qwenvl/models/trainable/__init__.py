"""Trainable parameters: freezing, parameter groups, sharded parameters."""
