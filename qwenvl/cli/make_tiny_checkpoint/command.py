"""Make a random-weight checkpoint of any supported family, small enough for tests or for the demo.

    python tools/make_tiny_checkpoint.py --family qwen3_vl --output DIR [--size demo] [--seed 0] [--dtype bfloat16]
        [--template thinking]

The folder has the same files as a real one (weights in safetensors, config, generation config, tokenizer, chat
template, image and video processor), written by the real classes, so that stock ``AutoModelForImageTextToText`` and
``AutoProcessor`` open it. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from qwenvl.cli.make_tiny_checkpoint.processor import TEMPLATES, Template, build_processor, default_template
from qwenvl.cli.make_tiny_checkpoint.shapes import Size, build_config
from qwenvl.cli.make_tiny_checkpoint.tokenizer import build_tokenizer
from qwenvl.families import FAMILIES, get_family
from qwenvl.models.mtp.layer import MTP, MultiTokenPrediction
from qwenvl.models.parts import language_model, layout_of, vision_tower
from qwenvl.utils.permissions import follow_umask


def build_tiny_checkpoint(
    family: str,
    output: Path,
    *,
    size: Size = "tiny",
    seed: int = 0,
    template: Template | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a random-weight checkpoint folder.

    Args:
        family: ``model_type``: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5 or qwen3_5_moe.
        output: Folder to write; created if needed, and files of the same names are replaced.
        size: ``tiny`` (well under 1 M parameters, for tests) or ``demo`` (2 to 5 M, learns simple images).
        seed: Seed of the random weights; the caller's random state does not change.
        template: Kind of chat template; None for the family's own.
        dtype: Type of the weights. With bfloat16, the weights of linear attention that published Qwen3.5 checkpoints
            hold in float32 (``A_log`` and the norms) stay in float32.

    Raises:
        UserError: The family is unknown.
    """
    tokenizer = build_tokenizer(family)
    model, mtp = draw_model(build_config(family, tokenizer, size), seed)
    if size == "demo":
        _strengthen_positions(model)
    model.generation_config = _generation_config(tokenizer)
    save_model(model, mtp, output, dtype)
    build_processor(family, tokenizer, template or default_template(family)).save_pretrained(output)
    follow_umask(output)


def draw_model(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, MultiTokenPrediction | None]:
    """Return a model with random weights, and its layer for multi-token prediction if its family has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return model, _draw_mtp(model) if get_family(config.model_type).mtp else None


def save_model(model: PreTrainedModel, mtp: MultiTokenPrediction | None, output: Path, dtype: torch.dtype) -> None:
    """Save a model as :func:`draw_model` returns it, in the types of published checkpoints if ``dtype`` is bfloat16."""
    _cast(model, dtype)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    if mtp is not None:
        _add_to_weights(output / SAFE_WEIGHTS_NAME, mtp.to(dtype))


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights, except those of linear attention that published checkpoints hold in float32."""
    layer = layout_of(model).linear_attention
    published = (f"{layer}.A_log", f"{layer}.norm.weight")
    kept = {name: value.data.float() for name, value in model.named_parameters() if name.endswith(published)}
    model.to(dtype)
    for name, value in kept.items():
        model.get_parameter(name).data = value


def _draw_mtp(model: Any) -> MultiTokenPrediction:
    """Return a multi-token prediction layer with random weights and the width of the model."""
    mtp = MultiTokenPrediction(language_model(model))
    for parameter in mtp.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=model.config.get_text_config().initializer_range)
    return mtp


def _add_to_weights(file: Path, mtp: MultiTokenPrediction) -> None:
    """Add the layer to the weights of a checkpoint, under the names of published checkpoints."""
    tensors = load_file(file) | {f"{MTP}.{name}": value for name, value in mtp.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _strengthen_positions(model: PreTrainedModel) -> None:
    """Scale the learned position embeddings of the vision tower to the size of the patch embeddings.

    Patch embeddings sum 1,536 products and are near 1, while position embeddings start as small as other weights; a
    model takes several times longer to learn positions from that.
    """
    tower = vision_tower(model)
    if hasattr(tower, "pos_embed"):  # the older families have only rotary positions
        with torch.no_grad():
            tower.pos_embed.weight.div_(tower.pos_embed.weight.std())


def _generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return greedy decoding that stops at the tokenizer's end of a turn."""
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    return GenerationConfig(
        bos_token_id=end_of_text, pad_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], do_sample=False
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and write the folder; return the exit code."""
    parser = argparse.ArgumentParser(description="Make a random-weight checkpoint of a family.")
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--size", default="tiny", choices=["tiny", "demo"])
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="type of the weights")
    parser.add_argument("--template", choices=TEMPLATES, help="kind of chat template; default: the family's own")
    arguments = parser.parse_args(argv)
    build_tiny_checkpoint(
        arguments.family,
        arguments.output,
        size=arguments.size,
        seed=arguments.seed,
        template=arguments.template,
        dtype=getattr(torch, arguments.dtype),
    )
    sys.stdout.write(f"{arguments.family} ({arguments.size}) written to {arguments.output}\n")
    return 0
