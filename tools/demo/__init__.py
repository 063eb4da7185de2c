"""What tools/demo_report.py is made of: answers to the held-out samples, the loss chart, the page."""
