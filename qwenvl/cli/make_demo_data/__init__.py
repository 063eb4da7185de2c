"""The parts of make_demo_data.py (drawing) and of demo_report.py: answers to held-out samples, losses, page."""
