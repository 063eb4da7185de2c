"""Find the layout of a checkpoint's experts from the headers of its files, before the weights are loaded.

Qwen3-VL-MoE was published with [experts, in, out]; transformers computes with [experts, out, in], and stock
``save_pretrained`` writes that. transformers recognises the layout by comparing shapes with the parameter in memory,
which fails if both layouts have the same shape (square experts) or if ZeRO-3 has left no shape to compare with.
Servers read the published layout alone, so that is what is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from qwenvl.families import get_family
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def experts_read_as_stored(model_name_or_path: str, model_type: str, **origin: Any) -> Iterator[None]:
    """Make ``from_pretrained`` transpose experts if, and only if, the files store them transposed.

    While the context is open, transformers' registry has another rule for the model type.

    Args:
        model_name_or_path: Folder, or repository on the Hugging Face hub.
        model_type: Model type of the checkpoint.
        origin: Keyword arguments of ``from_pretrained`` (``cache_dir``, ...).

    Raises:
        UserError: The files mix both layouts.
    """
    usual = get_checkpoint_conversion_mapping(model_type) or []
    undecided = _undecided(usual)
    transposed = stored_transposed(model_name_or_path, model_type, origin) if undecided else None
    if transposed is None:
        yield
        return
    before = get_checkpoint_conversion_mapping(model_type)
    _decide(undecided)
    rules = usual if transposed else [rule for rule in usual if rule not in undecided]
    register_checkpoint_conversion_mapping(model_type, rules, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(model_type, before, overwrite=True)


def save_experts_as_published(model: Any, model_type: str) -> None:
    """Make ``save_pretrained`` write a family's experts in its published layout, also where another one was read.

    Not square experts that were read from the other one: stock transformers would take them for that.

    Args:
        model: Model from ``from_pretrained``; its record of conversions is changed in place.
        model_type: Model type of the checkpoint.
    """
    rules = _undecided(get_checkpoint_conversion_mapping(model_type) or [])
    recorded = {pattern for rule in model._weight_conversions for pattern in rule.source_patterns}
    absent = [rule for rule in rules if not recorded.intersection(rule.source_patterns)]
    if absent and not _are_square(model.config.get_text_config()):
        _decide(absent)
        model._weight_conversions = [*model._weight_conversions, *absent]


def _undecided(rules: Iterable[Any]) -> list[Any]:
    return [rule for rule in rules if any(map(_goes_by_shape, getattr(rule, "operations", ())))]


def _decide(rules: Iterable[Any]) -> None:
    """Make rules that go by shape transpose always."""
    for rule in rules:
        for operation in filter(_goes_by_shape, rule.operations):
            operation.check_dims = False


def _are_square(config: PreTrainedConfig) -> bool:
    """Return whether one of the experts' projections is a square matrix."""
    return bool(config.hidden_size in (config.moe_intermediate_size, 2 * config.moe_intermediate_size))


def _goes_by_shape(operation: Any) -> bool:
    return bool(getattr(operation, "check_dims", False))


def stored_transposed(path: str, model_type: str, origin: dict[str, Any]) -> bool | None:
    """Return whether the experts are stored as [experts, in, out]; None without fused experts of a shape that fits.

    Square experts do not prevent an answer: the first projection is [2 x width, hidden] and the second [hidden, width],
    so that at most one of them is square.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, **origin).get_text_config()
    hidden, width = config.hidden_size, config.moe_intermediate_size
    in_memory = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    found: dict[bool, str] = {}
    for name, shape in _expert_shapes(path, get_family(model_type).layout.stacked_experts, origin):
        expected = in_memory.get(name.rpartition(".")[2], ())
        if shape != shape[::-1] and shape in (expected, expected[::-1]):
            found[shape != expected] = name
    if len(found) > 1:
        raise UserError(
            f"--model_name_or_path {path}: {found[True]} is stored as [experts, in, out], and {found[False]} as "
            "[experts, out, in]. Use a checkpoint that stores all of them in one layout."
        )
    transposed = next(iter(found), None)
    if transposed and _are_square(config):
        logger.warning(
            "%s: some of its experts are square. They are read and saved as [experts, in, out], as published; stock "
            "transformers cannot recognise the layout of square experts, and computes with the wrong one.",
            path,
        )
    return transposed


def _expert_shapes(path: str, experts: str, origin: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape, without the experts' dimension, of every tensor of fused experts."""
    for file in weight_files(path, origin):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if f".{experts}." in name:
                    yield name, tuple(tensors.get_slice(name).get_shape()[1:])


def weight_files(path: str, origin: dict[str, Any]) -> list[str]:
    """Return the checkpoint's safetensors files, downloaded if necessary; an empty list if it has none."""
    cache_dir = origin.get("cache_dir")
    missing = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(path, SAFE_WEIGHTS_NAME, cache_dir=cache_dir, **missing)  # preferred by transformers too
    if file is not None:
        return [file]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, cache_dir=cache_dir, **missing)
    return [] if index is None else list(get_checkpoint_shard_files(path, index, cache_dir=cache_dir)[0])
