"""Callbacks of a run: watchdog, preemption, guards, progress, run report."""
