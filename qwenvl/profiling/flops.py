"""Count floating point operations of a sample, from the model's config and the sample's measures.

A matrix product of [m, k] with [k, n] is 2 m k n operations (Kaplan et al., 2020, "Scaling Laws for Neural Language
Models", table 1); its backward pass is two products of the same size, one for the gradient of each factor. Everything
else (norms, activations, rotary positions) is left out, as in torch's ``FlopCounterMode``, which is the reference of
the tests. The count is linear in the measures of ``qwenvl.data.sample_stats``: tokens, squared tokens of each sample,
patches, squared patches of each image, trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qwenvl.families import Family, get_family
from qwenvl.models.lora.adapters import adapter_sizes, trains_whole
from qwenvl.models.trainable.freezing import parameter_modules

Part = Literal["vision", "merger", "language"]
_AnyPart = Literal["vision", "merger", "language", "mtp"]

_CHUNK = 64
"""Number of tokens in a chunk of the linear attention kernels."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations per unit of each measure, by name of the measure.

    Args:
        vision: Operations of the vision tower with its mergers.
        language: Operations of the language model with its vocabulary projection, and of the MTP layer.
    """

    vision: Mapping[str, float]
    language: Mapping[str, float]

    def split(self, measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the operations of (vision tower, language model): float64, each in the shape of ``measures``.

        Args:
            measures: Structured array with a field for each measure, of samples, packs or other sums of samples.
        """
        vision, language = (
            sum((each * measures[name] for name, each in part.items()), np.zeros(measures.shape))
            for part in (self.vision, self.language)
        )
        return vision, language

    def count(self, measures: np.ndarray) -> np.ndarray:
        """Return the operations of the whole model; see :meth:`split`."""
        vision, language = self.split(measures)
        total: np.ndarray = vision + language
        return total


@dataclass(frozen=True, slots=True)
class Trained:
    """Trainable parts of a model.

    Args:
        vision: Whether the vision tower without its mergers is trained in full.
        merger: Whether the mergers are trained in full.
        language: Whether the language model is trained in full.
        adapters: Number of elements of the adapters in each part; 0 if not known yet.
        mtp: Whether the layer for multi-token prediction is trained.
    """

    vision: bool = True
    merger: bool = True
    language: bool = True
    adapters: Mapping[Part, int] = field(default_factory=dict)
    mtp: bool = False

    def any_of(self, part: _AnyPart) -> bool:
        """Whether a part has trainable parameters."""
        return bool(getattr(self, part)) or part in self.adapters


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products of one part of a model.

    Args:
        part: Part of the model.
        measure: Name of the measure that they are proportional to.
        forward: Operations of the forward pass per unit of the measure.
        kind: Kind of factors. ``weights``: activations and weights; ``pixels``: the same, but the input needs no
            gradient; ``adapters``: activations and weights of adapters; ``attention``: activations and activations.
    """

    part: _AnyPart
    measure: str
    forward: float
    kind: Literal["weights", "pixels", "adapters", "attention"] = "weights"


def training_flops(config: Any, family: Family, trained: Trained, *, causal: bool = True) -> Flops:
    """Return the operations of forward and backward pass, without recomputation by checkpointing.

    If nothing is trainable, only the forward pass counts.

    Args:
        config: Config of the model.
        family: Family of the model.
        trained: Trainable parts. Frozen weights need no gradient, and no gradient passes through a part if nothing
            below it is trainable.
        causal: Whether to count only the unmasked half of each sample's attention in the language model, like flash
            attention, rather than the whole square.
    """
    computed = (*products(config, family, causal=causal), *_adapters(config.vision_config, trained))
    if trained.mtp:
        computed += tuple(_mtp(config.get_text_config(), family, 0.5 if causal else 1.0, trained))
    return _sum((product, 1 + _backward(product, trained)) for product in computed)


def products(config: Any, family: Family, *, causal: bool = True) -> tuple[Product, ...]:
    """Return the matrix products of a model's forward pass; see :func:`training_flops`."""
    share = 0.5 if causal else 1.0
    own = getattr(config.vision_config, "products", None)  # a tower that is not from transformers
    vision = _vision(config.vision_config, family) if own is None else (Product(*product) for product in own())
    return (*vision, *_language(config.get_text_config(), family, share))


def _adapters(config: Any, trained: Trained) -> Iterator[Product]:
    """Yield the products of adapters, which get the same tokens, patches or merged patches as their layer."""
    tokens_of_patch = 1 / config.spatial_merge_size**2
    rates = {"vision": ("patches", 1.0), "merger": ("patches", tokens_of_patch), "language": ("tokens", 1.0)}
    for part, elements in trained.adapters.items():
        measure, rate = rates[part]
        yield Product(part, measure, 2.0 * rate * elements, "adapters")


def _sum(weighed: Iterator[tuple[Product, int]]) -> Flops:
    vision: dict[str, float] = {}
    language: dict[str, float] = {}
    for product, passes in weighed:
        flops = language if product.part in ("language", "mtp") else vision
        flops[product.measure] = flops.get(product.measure, 0.0) + product.forward * passes
    return Flops(vision, language)


def _backward(product: Product, trained: Trained) -> int:
    """Return the number of products of the same size in the backward pass: 0 to 2."""
    parts: tuple[_AnyPart, ...] = ("vision", "merger", "language", "mtp")
    reached = any(trained.any_of(part) for part in parts[: parts.index(product.part) + 1])  # gradients pass through
    if product.kind == "attention":
        return 2 * reached
    weights = product.kind == "adapters" or getattr(trained, product.part)
    return (reached and product.kind != "pixels") + weights


def _vision(config: Any, family: Family) -> Iterator[Product]:
    """Yield the products of the tower: each patch is embedded, and attends to the patches of its own image or frames.

    Sources: ``Qwen2VisionTransformerPretrainedModel``, ``Qwen2_5_VisionTransformerPretrainedModel`` and
    ``Qwen3VLVisionModel`` of transformers. The windows of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1) are counted as
    full, although windows at the border of an image are smaller.
    """
    width = getattr(config, "embed_dim", None) or config.hidden_size
    inner = int(width * config.mlp_ratio) if hasattr(config, "mlp_ratio") else config.intermediate_size
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    yield Product("vision", "patches", 2.0 * pixels * width, "pixels")
    matrices = 4 * width * width + (3 if family.gated_vision else 2) * width * inner
    yield Product("vision", "patches", 2.0 * config.depth * matrices)
    full = config.depth
    if hasattr(config, "fullatt_block_indexes"):
        full = len(set(config.fullatt_block_indexes))
        window = (config.window_size // config.patch_size) ** 2
        yield Product("vision", "patches", 4.0 * (config.depth - full) * window * width, "attention")
    yield Product("vision", "patches_squared", 4.0 * full * width, "attention")
    merged = width * config.spatial_merge_size**2  # patches that become one token, side by side
    mergers = 1 + len(getattr(config, "deepstack_visual_indexes", None) or ())
    out = getattr(config, "out_hidden_size", config.hidden_size)
    share = mergers / config.spatial_merge_size**2
    yield Product("merger", "patches", 2.0 * share * (merged * merged + merged * out))


def _language(config: Any, family: Family, share: float) -> Iterator[Product]:
    """Yield the products of the language model, whose vocabulary projection runs on trained tokens only.

    Args:
        config: Config of the language model.
        family: Family of the model.
        share: Computed share of the square of attention, 0 to 1.
    """
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = sum(kind == "linear_attention" for kind in layers)
    full = len(layers) - linear
    yield from _full_attention("language", config, family, full, share)
    if linear:
        yield from _linear_attention(config, linear)
    matrices = sum(_feed_forward(config, family, layer) for layer in range(config.num_hidden_layers))
    yield Product("language", "tokens", 2.0 * matrices)
    yield Product("language", "trained_tokens", 2.0 * config.hidden_size * config.vocab_size)


def _mtp(config: Any, family: Family, share: float, trained: Trained) -> Iterator[Product]:
    """Yield the products of the layer for multi-token prediction, with its share of the vocabulary projection.

    Backward through the projection is one product if its weight is frozen, as for inputs without a gradient.
    """
    yield Product("mtp", "tokens", 2.0 * 2 * config.hidden_size**2)
    yield from _full_attention("mtp", config, family, 1, share)
    yield Product("mtp", "tokens", 2.0 * _feed_forward(config, family, config.num_hidden_layers - 1))
    projection = 2.0 * config.hidden_size * config.vocab_size
    yield Product("mtp", "trained_tokens", projection, "weights" if trained.language else "pixels")


def _full_attention(part: _AnyPart, config: Any, family: Family, layers: int, share: float) -> Iterator[Product]:
    """Yield the products of a number of full attention layers; ``share`` as in :func:`_language`."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    gated = 2 if family.linear_attention else 1  # Qwen3.5 projects a gate beside each query
    attention = config.hidden_size * ((gated + 1) * queries + 2 * keys)
    yield Product(part, "tokens", 2.0 * layers * attention)
    yield Product(part, "tokens_squared", 4.0 * layers * queries * share, "attention")


def _linear_attention(config: Any, layers: int) -> Iterator[Product]:
    """Yield the products of the gated delta rule in chunks (Yang et al., 2024, arXiv 2412.06464, section 3.3).

    For a chunk of C tokens and a head with keys of width k and values of width v: keys with keys and with queries,
    2 C C k; the triangular system solved for values and keys, C C (v + k) / 2; new values with queries, C C v; the
    state read twice and written once, 3 C k v.
    """
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    keys, values = config.linear_num_key_heads * key, config.linear_num_value_heads * value
    projections = config.hidden_size * (2 * keys + 3 * values + 2 * config.linear_num_value_heads)
    convolution = config.linear_conv_kernel_dim * (2 * keys + values)
    yield Product("language", "tokens", 2.0 * layers * (projections + convolution))
    chunk = 2 * _CHUNK * key + _CHUNK * (value + key) / 2 + _CHUNK * value + 3 * key * value
    yield Product("language", "tokens", 2.0 * layers * config.linear_num_value_heads * chunk, "attention")


def _feed_forward(config: Any, family: Family, layer: int) -> float:
    """Return the number of weights in a layer that a token uses; of a mixture: router, chosen and shared experts.

    The choice of mixture layers follows ``Qwen3VLMoeTextDecoderLayer`` of transformers.
    """
    hidden = config.hidden_size
    step = getattr(config, "decoder_sparse_step", 1)
    if not family.moe or layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % step:
        return 3.0 * hidden * config.intermediate_size
    experts = 3.0 * hidden * config.num_experts_per_tok * config.moe_intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return experts + hidden * config.num_experts + (3.0 * hidden * shared + hidden if shared else 0.0)


def flops_of(model: Any) -> Flops:
    """Return the operations per measure of a model that is ready for training."""
    adapters = adapter_sizes(model, per_token=True)
    groups = parameter_modules(model)
    whole = {groups[name] for name, value in model.named_parameters() if value.requires_grad and trains_whole(name)}
    trained = Trained("vision" in whole, "merger" in whole, "language" in whole, adapters, "mtp" in whole)
    return training_flops(model.config, get_family(model.config.model_type), trained)
