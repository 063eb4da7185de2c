"""Records of a run: start-up table, versions, skipped samples."""
