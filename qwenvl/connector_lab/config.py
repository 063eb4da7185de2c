"""Configs of the connector lab's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

MODEL_TYPE = "connector_lab"  # has to be the name of this folder: qwenvl.families imports it by model_type

Connector = Literal["qformer", "resampler", "mlp", "merger", "mean_pool"]
CONNECTORS: tuple[Connector, ...] = ("qformer", "resampler", "mlp", "merger", "mean_pool")

MERGE_SIZE = 2
"""Patches per side that the connector ``merger`` merges, as in Qwen2-VL."""


class LabVisionConfig(PretrainedConfig):
    """Config of encoder and connector.

    Args:
        encoder_config: Config of the encoder, or its fields.
        connector: Name of the connector; see :mod:`qwenvl.connector_lab.connectors`.
        num_queries: Tokens per image of ``qformer`` and ``resampler``, whatever the image size.
        connector_hidden_size: Width of ``qformer``.
        connector_layers: Number of layers of ``qformer``.
        connector_heads: Attention heads of ``qformer`` and ``resampler``.
        out_hidden_size: Width of the language model.
        initializer_range: Standard deviation of new weights of ``qformer``.
        options: Keyword arguments of ``PretrainedConfig``.
    """

    model_type = f"{MODEL_TYPE}_vision"
    base_config_key = "vision_config"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012  transformers looks for it in the class

    def __init__(
        self,
        encoder_config: dict[str, Any] | PretrainedConfig | None = None,
        *,
        connector: Connector = "mlp",
        num_queries: int = 64,
        connector_hidden_size: int = 768,
        connector_layers: int = 12,
        connector_heads: int = 12,
        out_hidden_size: int = 0,
        initializer_range: float = 0.02,
        **options: Any,
    ) -> None:
        self.encoder_config = _as_config(encoder_config)
        self.connector = connector
        self.num_queries = num_queries
        self.connector_hidden_size = connector_hidden_size
        self.connector_layers = connector_layers
        self.connector_heads = connector_heads
        self.out_hidden_size = out_hidden_size
        self.initializer_range = initializer_range
        super().__init__(**options)

    @property
    def spatial_merge_size(self) -> int:
        """Patches per side of the blocks in which the encoder gets its patches."""
        return MERGE_SIZE if self.connector == "merger" else 1

    @property
    def tokens_per_frame(self) -> int | None:
        """Tokens per image, or per temporal step of a video; None where it is the number of merged patches."""
        if self.connector in ("qformer", "resampler"):
            return self.num_queries
        return 1 if self.connector == "mean_pool" else None

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch."""
        return int(self.encoder_config.patch_size)

    @property
    def temporal_patch_size(self) -> int:
        """Frames per patch: one for encoders that only support images."""
        return int(getattr(self.encoder_config, "temporal_patch_size", 1))

    @property
    def in_channels(self) -> int:
        """Colour channels of a pixel."""
        names = ("in_channels", "num_channels")
        return int(next(getattr(self.encoder_config, name) for name in names if hasattr(self.encoder_config, name)))

    @property
    def encoder_width(self) -> int:
        """Width of the encoder's features; Qwen2-VL's ``hidden_size`` is the width after its merger instead."""
        return int(getattr(self.encoder_config, "embed_dim", None) or self.encoder_config.hidden_size)

    def products(self) -> Iterator[tuple[Any, ...]]:
        """Yield the matrix products of encoder and connector whose cost grows with the number of patches.

        Each tuple holds the arguments of a :class:`qwenvl.profiling.flops.Product`. Not counted are the constant cost
        per image of learned queries (all but their attention to patches) and of a class token. Sources:
        :mod:`qwenvl.connector_lab.connectors`, ``CLIPVisionModel`` and ``Blip2QFormerModel`` of transformers.
        """
        encoder, width, out, queries = (
            self.encoder_config,
            self.encoder_width,
            self.out_hidden_size,
            self.num_queries,
        )
        inner = int(width * encoder.mlp_ratio) if hasattr(encoder, "mlp_ratio") else encoder.intermediate_size
        layers = getattr(encoder, "depth", None) or encoder.num_hidden_layers
        pixels = self.in_channels * self.temporal_patch_size * self.patch_size**2
        yield ("vision", "patches", 2.0 * pixels * width, "pixels")
        yield ("vision", "patches", 2.0 * layers * (4 * width * width + 2 * width * inner))
        yield ("vision", "patches_squared", 4.0 * layers * width, "attention")
        merged = width * self.spatial_merge_size**2
        hidden, crossing = (
            self.connector_hidden_size,
            -(-self.connector_layers // 2),
        )  # every other layer, from the first
        weights, attention = {
            "mlp": (width * out + out * out, 0),
            "merger": ((merged * merged + merged * out) / self.spatial_merge_size**2, 0),
            "mean_pool": (0, 0),
            "qformer": (2 * crossing * width * hidden, 2 * crossing * queries * hidden),
            "resampler": (width * out + 2 * out * out, 2 * queries * out),
        }[self.connector]
        yield ("merger", "patches", 2.0 * weights)
        yield ("merger", "patches", 2.0 * attention, "attention")


class LabConfig(PretrainedConfig):
    """Config of encoder, connector and language model.

    Args:
        vision_config: Config of encoder and connector, or its fields.
        text_config: Config of the language model, or its fields.
        image_token_id: Id of the placeholder token of images.
        video_token_id: Id of the placeholder token of videos.
        options: Keyword arguments of ``PretrainedConfig``.
    """

    model_type = MODEL_TYPE
    sub_configs = {"vision_config": LabVisionConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | LabVisionConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        *,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        **options: Any,
    ) -> None:
        known = isinstance(vision_config, LabVisionConfig)
        self.vision_config = vision_config if known else LabVisionConfig(**(vision_config or {}))
        self.text_config = _as_config(text_config)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        options.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**options)


def _as_config(config: dict[str, Any] | PretrainedConfig | None) -> Any:
    """Return a config built from its fields; a config is returned unchanged."""
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config
