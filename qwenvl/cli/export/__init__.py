"""Parts of tools/export.py: quantized copies of a trained model, checked against it."""
