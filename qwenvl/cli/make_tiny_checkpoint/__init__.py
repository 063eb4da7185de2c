"""Parts of ``tools/make_tiny_checkpoint.py``: shapes, tokenizer and chat templates of random-weight checkpoints."""
