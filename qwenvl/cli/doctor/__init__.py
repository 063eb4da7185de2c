"""Parts of tools/doctor.py: checks of packages, devices, limits and training."""
