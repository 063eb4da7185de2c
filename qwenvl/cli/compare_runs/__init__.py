"""Parts of tools/compare_runs.py: the records of runs, and the command that puts them side by side."""
