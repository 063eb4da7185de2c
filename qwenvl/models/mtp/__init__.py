"""The layer for multi-token prediction (MTP): its computation, and its tensors in a checkpoint's files."""
