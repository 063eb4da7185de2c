"""Parts of ``tools/connector_lab.py``: recipes of experiments, their runs, and the page of results."""
