"""Parts of tools/doctor.py."""
