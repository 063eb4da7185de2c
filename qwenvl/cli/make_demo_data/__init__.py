"""Parts of tools/make_demo_data.py: digits, drawn shapes and scenes, clips, and their registry entries."""
