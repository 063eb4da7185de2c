"""Parts of tools/view_data.py: samples as the model gets them, statistics, drawings, and the site."""
