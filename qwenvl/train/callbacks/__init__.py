"""What watches a run: watchdog, preemption, guards, progress, run report."""
