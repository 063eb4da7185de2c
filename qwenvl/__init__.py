"""Supervised fine-tuning of the Qwen vision-language models."""

__version__ = "0.1.0"
