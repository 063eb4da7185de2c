"""A small vision-language model of interchangeable parts: a vision encoder, a connector, and a causal language model.

Encoder and language model are stock classes of transformers; the connector stands where Qwen-VL has its merger. So the
data path, the trainer, adapters, checkpoints and evaluation take it as one more family (``connector_lab``).
"""
