"""Parts of tools/view_data.py: samples as the model gets them, statistics, charts, and the site."""
