"""Parts of ``benchmarks/gpu.py``: each a module, whose items run in processes of their own."""
