"""FLOPs, memory, throughput and traces of training steps."""
