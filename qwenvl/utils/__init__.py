"""What every layer uses: errors, logging, ranks, and the table of model families."""
