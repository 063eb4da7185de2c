"""Data flags of the command-line tools; opens datasets and processors as training does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qwenvl.config import DataArguments
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import add_tokens, build_encoder, open_processor
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.types import DatasetSpec
from qwenvl.families import FAMILIES, Family, get_family
from qwenvl.models.loading import read_model_type
from qwenvl.models.lora.files import CONFIG_FILE, find_base, read_config
from qwenvl.utils.errors import UserError

TRAINING_ALONE = frozenset(
    {
        *("data_flatten", "data_packing", "packing_plan", "group_by_cost", "base_interval", "save_processor_limits"),
        *("eval_dataset_use", "eval_ratio", "on_bad_sample"),
    }
)
"""Data flags that training alone reads, but for the tools that take some of them out of this set."""


@dataclass
class ToolArguments(DataArguments):
    """Flags of the tools that read data, in addition to the data flags of training."""

    model_name_or_path: str = field(default="", metadata={"help": "Checkpoint, or a folder with its processor."})
    base: str | None = field(
        default=None,
        metadata={"help": "Checkpoint below the adapters of model_name_or_path. Default: as in adapter_config.json."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Model family, for a folder without config.json. Default: by its processor."}
    )
    annotation_path: str | None = field(default=None, metadata={"help": "Annotation file, instead of dataset_use."})
    data_path: str = field(default="", metadata={"help": "Folder of its media."})


def chosen_datasets(arguments: ToolArguments) -> list[DatasetSpec]:
    """Return the datasets that the flags name; a dataset of ``--annotation_path`` is named after its file.

    Raises:
        UserError: No dataset is named, or one is unknown.
    """
    if arguments.annotation_path is not None:
        path = arguments.annotation_path
        return [DatasetSpec(Path(path).name.partition(".")[0] or "annotations", (path,), arguments.data_path)]
    if arguments.dataset_use:
        return parse_dataset_use(arguments.dataset_use, load_registry(arguments.dataset_registry))
    raise UserError("Name the data: --dataset_use NAMES, or --annotation_path FILE with --data_path DIR.")


def open_encoder(arguments: ToolArguments, max_length: int) -> tuple[SampleEncoder, Any]:
    """Open the processor; return the encoder that training would build from it, and the processor.

    Args:
        arguments: Flags of the tool.
        max_length: Most tokens of a sample.

    Raises:
        UserError: There is no processor, or the model family is unknown.
    """
    processor = open_processor(arguments.model_name_or_path)
    add_tokens(processor, arguments.additional_tokens or ())
    family, config = family_and_config(arguments, processor)
    return build_encoder(processor, config, family, arguments, max_length), processor


def family_and_config(arguments: ToolArguments, processor: Any) -> tuple[Family, PretrainedConfig]:
    """Read the family and the config from config.json, or else from the processor's class and its family's defaults.

    Raises:
        UserError: The checkpoint has no readable config, or its family is unknown.
    """
    folder = Path(arguments.model_name_or_path)
    if (folder / CONFIG_FILE).exists():
        adapted = read_config(folder, find_base(folder, arguments.base))
        return get_family(adapted.model_type), adapted
    if arguments.base is not None:
        raise UserError(f"--base {arguments.base} has no effect: {folder} holds no adapters. Leave it out.")
    if arguments.model_type is None and ((folder / "config.json").exists() or not folder.is_dir()):
        family = get_family(read_model_type(arguments.model_name_or_path))
        return family, AutoConfig.from_pretrained(arguments.model_name_or_path)
    by_class = {"Qwen2VLProcessor": "qwen2_vl", "Qwen2_5_VLProcessor": "qwen2_5_vl", "Qwen3VLProcessor": "qwen3_vl"}
    model_type = arguments.model_type or by_class.get(type(processor).__name__)
    if model_type is None:
        raise UserError(f"The folder has no config.json: give --model_type, one of {', '.join(FAMILIES)}.")
    config = AutoConfig.for_model(get_family(model_type).model_type)
    tokens = [processor.image_token, processor.video_token]
    if get_family(model_type).timed_positions:
        config.vision_config.tokens_per_second = 2  # config.json of every Qwen2.5-VL; transformers' default is 4
    config.image_token_id, config.video_token_id = processor.tokenizer.convert_tokens_to_ids(tokens)
    return get_family(model_type), config
