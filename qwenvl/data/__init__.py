"""The data path: annotation files to model batches."""
