"""Builds checkpoints of the connector lab from a vision encoder and a language model.

Each part may be a folder, a name on the hub, or a checkpoint of the lab, whose encoder or language model is then
reused: a run can start from parts that an earlier run trained.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from qwenvl.connector_lab.config import MODEL_TYPE, Connector, LabConfig, LabVisionConfig
from qwenvl.connector_lab.encoder import IMAGE_ENCODERS, TOWERS
from qwenvl.connector_lab.family import register
from qwenvl.connector_lab.model import LabForConditionalGeneration
from qwenvl.connector_lab.processor import END, MEDIA_TOKENS, START, LabProcessor, with_images
from qwenvl.models.lora.new_tokens import make_room
from qwenvl.models.quantization import refuse_quantized
from qwenvl.utils.errors import UserError
from qwenvl.utils.permissions import follow_umask

_LISTED = 4


@dataclass(frozen=True)
class ConnectorSettings:
    """Kind and sizes of a connector; see :class:`qwenvl.connector_lab.config.LabVisionConfig`.

    Args:
        connector: Kind of connector.
        num_queries: Tokens per image of ``qformer`` and ``resampler``.
        connector_hidden_size: Width of ``qformer``.
        connector_layers: Number of layers of ``qformer``.
        connector_heads: Attention heads of ``qformer`` and ``resampler``.
        initializer_range: Standard deviation of the initial weights of ``qformer``.
    """

    connector: Connector = "mlp"
    num_queries: int = 64
    connector_hidden_size: int = 768
    connector_layers: int = 12
    connector_heads: int = 12
    initializer_range: float = 0.02


@dataclass(frozen=True)
class _Encoder:
    """A vision encoder, with the mean and standard deviation that normalise its images."""

    config: Any
    weights: dict[str, Tensor]
    mean: list[float]
    std: list[float]


def build_lab(
    encoder: str,
    language_model: str,
    settings: ConnectorSettings,
    output: Path,
    *,
    drop_layers: int | None = None,
    seed: int = 0,
) -> None:
    """Write a checkpoint of the lab: both parts with their weights, joined by a connector with random weights.

    Args:
        encoder: CLIP, SigLIP, Qwen2-VL or Qwen3-VL, whose vision encoder is used; or a checkpoint of the lab.
        language_model: Causal language model with a chat template; or a checkpoint of the lab.
        settings: Kind and sizes of the connector.
        output: Folder to write.
        drop_layers: Number of last encoder layers to leave out; None for 1 with CLIP, as in LLaVA, and 0 with others.
        seed: Seed of the connector's weights; the caller's random state does not change.

    Raises:
        UserError: A part cannot be used.
    """
    register()
    part = _open_encoder(encoder, drop_layers)
    text, tokenizer = _open_language_model(language_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LabForConditionalGeneration(_config(part, text, tokenizer, settings))
    _take_over(model.model.visual.encoder, part.weights, encoder)
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    _processor(model.config.vision_config, part, tokenizer).save_pretrained(output)
    follow_umask(output)


def _config(part: _Encoder, text: Any, tokenizer: Any, settings: ConnectorSettings) -> LabConfig:
    vision = LabVisionConfig(part.config, out_hidden_size=text.config.hidden_size, **asdict(settings))
    image, video = tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS.values()))
    return LabConfig(vision, text.config, image_token_id=image, video_token_id=video)


def _open_encoder(name: str, drop_layers: int | None) -> _Encoder:
    """Open the vision encoder of a checkpoint.

    Raises:
        UserError: The checkpoint has no encoder that the lab supports.
    """
    whole = read_part_config(name, "encoder")
    vision = getattr(whole, "vision_config", whole)
    config = copy.deepcopy(getattr(vision, "encoder_config", vision))
    if config.model_type not in (*IMAGE_ENCODERS, *TOWERS):
        known = ", ".join((*IMAGE_ENCODERS, *TOWERS))
        raise UserError(f"encoder {name}: model_type {config.model_type!r} is not supported by the lab: {known}.")
    opened = _open_part(name, whole, config)
    if whole.model_type != MODEL_TYPE:
        layers = "depth" if config.model_type in TOWERS else "num_hidden_layers"
        dropped = int(config.model_type == "clip_vision_model") if drop_layers is None else drop_layers
        setattr(config, layers, getattr(config, layers) - dropped)
    elif drop_layers:
        raise UserError(f"encoder {name}: a checkpoint of the lab keeps its layers; leave out drop_layers.")
    images = AutoImageProcessor.from_pretrained(name)
    return _Encoder(config, opened.state_dict(), list(images.image_mean), list(images.image_std))


def _open_part(name: str, whole: Any, config: Any) -> PreTrainedModel:
    """Return the stock encoder of a checkpoint, with its weights."""
    if whole.model_type in (MODEL_TYPE, "qwen2_vl", "qwen3_vl"):
        visual: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).model.visual
        encoder: PreTrainedModel = getattr(visual, "encoder", visual)
        return encoder
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    return getattr(encoder, "vision_model", encoder) if hasattr(whole, "vision_config") else encoder


def _take_over(encoder: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Load the encoder's weights; ignore those of dropped layers, poolings and mergers.

    Raises:
        UserError: Weights are missing.
    """
    missing = encoder.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise UserError(f"encoder {name}: it lacks {len(missing)} weights: {', '.join(missing[:_LISTED])}.")


def _open_language_model(name: str) -> tuple[Any, Any]:
    """Open a causal language model and its tokenizer, and add the image tokens.

    Raises:
        UserError: It has no chat template, or an architecture that the trainer does not support.
    """
    whole = read_part_config(name, "language_model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if whole.model_type == MODEL_TYPE:
        text = _as_causal_lm(AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32))
    else:
        text = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        if not tokenizer.chat_template:
            raise UserError(f"language_model {name}: it has no chat template. Choose a chat model.")
        tokenizer.chat_template = with_images(tokenizer.chat_template)
    head = text.get_output_embeddings()
    if not hasattr(text.base_model, "layers") or head is None or head.bias is not None:
        raise UserError(
            f"language_model {name}: {type(text).__name__} is not built as Llama and Qwen are: layers of the base "
            "model in `layers`, and a projection to the vocabulary without a bias."
        )
    known = len(tokenizer)
    wanted = [AddedToken(token, special=True, normalized=False) for token in (START, END, *MEDIA_TOKENS.values())]
    tokenizer.add_tokens(wanted, special_tokens=True)
    make_room(text, list(range(known, len(tokenizer))), may_grow=True)
    return text, tokenizer


def _as_causal_lm(lab: Any) -> Any:
    """Return the language model of a checkpoint of the lab as a separate model."""
    text = AutoModelForCausalLM.from_config(lab.config.text_config)
    text.base_model.load_state_dict(lab.model.language_model.state_dict())
    text.get_output_embeddings().load_state_dict(lab.lm_head.state_dict())
    text.generation_config = lab.generation_config
    return text


def read_part_config(name: str, part: str) -> Any:
    """Return the config of a checkpoint whose encoder or language model the lab uses.

    Args:
        name: Folder or Hugging Face id.
        part: ``encoder`` or ``language_model``, for messages.

    Raises:
        UserError: It cannot be opened, or its weights are quantized.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{part} {name}: its config cannot be opened: {first}") from error
    refuse_quantized(config.to_dict(), f"{part} {name}")
    return config


def _processor(config: LabVisionConfig, part: _Encoder, tokenizer: Any) -> LabProcessor:
    """Return the processor: the encoder's patches, mean and standard deviation, and the language model's tokenizer.

    Pixel limits: from a quarter of the encoder's image size to the whole of it; for encoders of any size, 28 x 28 to
    1280 x 28 x 28, as in the examples of Qwen-VL. Training sets its own by ``--min_pixels`` and ``--max_pixels``.
    """
    side = getattr(config.encoder_config, "image_size", None)
    size = {"shortest_edge": 28 * 28, "longest_edge": 1280 * 28 * 28}
    if side is not None:
        size = {"shortest_edge": side * side // 4, "longest_edge": side * side}
    pixels: dict[str, Any] = {
        "patch_size": config.patch_size,
        "merge_size": config.spatial_merge_size,
        "temporal_patch_size": config.temporal_patch_size,
        "image_mean": part.mean,
        "image_std": part.std,
        "size": size,
    }
    return LabProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
        tokens_per_frame=config.tokens_per_frame,
    )
