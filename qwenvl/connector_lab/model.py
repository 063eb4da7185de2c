"""The connector lab's model, built like a transformers model, with Qwen-VL's names of submodules.

model.visual.encoder   a stock vision encoder        (tune_mm_vision)
model.visual.merger    the connector                 (tune_mm_mlp)
model.language_model   a stock causal language model (tune_mm_llm)
lm_head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from qwenvl.connector_lab.config import LabConfig, LabVisionConfig
from qwenvl.connector_lab.connectors import Sizes, build_connector
from qwenvl.connector_lab.encoder import TOWERS, build_encoder, encode_patches
from qwenvl.connector_lab.encoder import frame_sizes as read_sizes
from qwenvl.models.vision.grid_inputs import Grids, TowerGrids


class LabPreTrainedModel(PreTrainedModel):
    """Base class of the models of this file."""

    config_class: Any = LabConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # class attributes, as transformers declares them; the cache has the second name from 5.24 on
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


@dataclass(frozen=True, slots=True)
class LabGrids:
    """Computes the inputs of a :class:`LabVisionModel`; a :class:`~qwenvl.models.vision.grid_inputs.GridDescriber`.

    Args:
        tower: Settings of an encoder that is a tower of Qwen-VL; None for other encoders.
    """

    tower: TowerGrids | None

    def describe(self, grids: Grids) -> dict[str, Any]:
        """Return ``grid_thw``, ``frame_sizes`` and the inputs of the encoder, on the host."""
        described = {"grid_thw": torch.tensor([tuple(grid) for grid in grids])}
        return {**described, **(self.tower.describe(grids) if self.tower else {}), "frame_sizes": read_sizes(grids)}


class LabVisionModel(LabPreTrainedModel):
    """Encoder and connector.

    Args:
        config: Config of encoder and connector.
    """

    config_class = LabVisionConfig
    main_input_name = "patches"

    def __init__(self, config: LabVisionConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.merger = build_connector(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initial weights that torch and the connectors' classes drew, whose scale depends on the width."""

    def grid_describer(self) -> LabGrids:
        """Return what computes the inputs of :meth:`forward` besides patches."""
        is_tower = self.encoder.config.model_type in TOWERS
        return LabGrids(TowerGrids.of(self.encoder) if is_tower else None)

    def forward(
        self,
        patches: Tensor,
        grid_thw: Tensor,
        frame_sizes: Sizes | None = None,
        return_dict: bool = True,
        **described: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images and convert their features to tokens.

        Args:
            patches: [n, channels x frames x patch x patch], normalised, as the processor cuts them.
            grid_thw: int64 [images, 3], (temporal, height, width) of each in patches.
            frame_sizes: Result of :func:`qwenvl.connector_lab.encoder.frame_sizes` for the grids; None to compute it,
                which reads the grids from the device.
            return_dict: Always True.
            described: Inputs that a tower would otherwise compute from the grids.

        Returns:
            ``last_hidden_state`` [n, encoder width], and ``pooler_output`` [tokens, width of the language model].
        """
        assert return_dict
        sizes = read_sizes(grid_thw.tolist()) if frame_sizes is None else frame_sizes
        features = encode_patches(self.encoder, self.config, patches, grid_thw, sizes, **described)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.merger(features, sizes))


class LabModel(LabPreTrainedModel):
    """Encoder, connector and language model, without the projection to the vocabulary.

    Args:
        config: Config of all three.
    """

    def __init__(self, config: LabConfig) -> None:
        super().__init__(config)
        self.visual = LabVisionModel._from_config(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of tokens."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of tokens."""
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Replace placeholder tokens by the tokens of images and videos, and run the language model.

        Args:
            input_ids: int64 [B, T].
            inputs_embeds: [B, T, H], embeddings to use instead of ``input_ids``.
            position_ids: int64 [B, T]; or [3 or 4, B, T] as for Qwen-VL, of which the last row is used.
            pixel_values: Patches of the images.
            image_grid_thw: int64 [images, 3].
            pixel_values_videos: Patches of the videos.
            video_grid_thw: int64 [videos, 3].
            options: Keyword arguments of the language model.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for patches, grids, token in (
            (pixel_values, image_grid_thw, self.config.image_token_id),
            (pixel_values_videos, video_grid_thw, self.config.video_token_id),
        ):
            if patches is not None:
                tokens = self.visual(patches.to(self.visual.dtype), grid_thw=grids).pooler_output
                places = (input_ids == token).unsqueeze(-1)
                inputs_embeds = inputs_embeds.masked_scatter(places, tokens.to(inputs_embeds.dtype))
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids[-1]
        return self.language_model(inputs_embeds=inputs_embeds, position_ids=position_ids, **options)


class LabForConditionalGeneration(LabPreTrainedModel, GenerationMixin):
    """The whole model. It has no loss of its own; the trainer computes it.

    Args:
        config: Config of all parts.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LabConfig) -> None:
        super().__init__(config)
        self.model = LabModel(config)
        text = config.text_config
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection to the vocabulary."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to the vocabulary."""
        self.lm_head = new_embeddings

    def forward(  # noqa: PLR0913  transformers inspects the names of the arguments
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, kept, V] of the last ``logits_to_keep`` positions (0: all), or of a tensor of positions.

        See :meth:`LabModel.forward` for the other arguments; ``mm_token_type_ids`` of the processor is ignored. The
        language model's cache is passed and returned under the name that the installed transformers uses.
        """
        del mm_token_type_ids
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        cache = {name: value for name, value in output.items() if name in ("cache", "past_key_values")}
        return CausalLMOutputWithPast(logits=logits, **cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass the pixels to the first step only: later steps have the images in the cache.

        ``generate`` inspects the name ``kwargs`` to accept all arguments of ``forward``.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs |= dict.fromkeys(("pixel_values", "pixel_values_videos"))
        return inputs
