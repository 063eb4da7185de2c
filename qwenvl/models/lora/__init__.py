"""LoRA adapters: targets, files, merging, quantized bases, rows of added tokens."""
