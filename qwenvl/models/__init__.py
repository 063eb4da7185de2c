"""The model: loading, freezing, the vision call, the loss, and parameter groups for the optimizer."""
