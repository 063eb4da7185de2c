"""A vision-language model of interchangeable parts: a vision encoder, a connector, and a causal language model.

Encoder and language model are stock classes of transformers; the connector replaces Qwen-VL's merger. So the data path,
the trainer, adapters, checkpoints and evaluation support it as one more family (``connector_lab``).
"""
