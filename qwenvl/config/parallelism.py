"""Refuse all ways to split one sample over several devices: none of them works for these models yet.

Checked with DeepSpeed 0.19.8, accelerate 1.15 and transformers 5.23:

- DeepSpeed's Ulysses wants every tensor of a batch to be [B, T] (``UlyssesSPDataLoaderAdapter.refill``), and joins the
  ranks' ``position_ids`` along dimension 1 (``UlyssesSPAttentionHF.forward``). M-RoPE positions are [4, B, T], so
  that it would join the samples; pixels are not tokens; and features of an image would have to reach the rank that
  holds its placeholders, for every deepstack layer.
- Context parallelism of accelerate cuts the same buffers along dimension 1
  (``Trainer._prepare_context_parallel_inputs``) and has no vision part either.
- Tensor parallelism shards weights on loading, by plans that Qwen3-VL does not have and that do not include the head
  that computes the loss here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from qwenvl.config.rules.engines import read_settings
from qwenvl.utils.errors import UserError

_VARIABLES = {kind: f"PARALLELISM_CONFIG_{kind}_SIZE" for kind in ("SP", "CP", "TP")}
_FLAGS = frozenset(
    {
        *("parallelism_config", "sequence_parallel_size", "context_parallel_size", "tensor_parallel_size"),
        *("sp_size", "cp_size", "tp_size", "ulysses_size", "sequence_parallel", "context_parallel", "tensor_parallel"),
    }
)
_REASON = (
    "Sequence, context and tensor parallelism are not supported: the libraries split token ids and positions of one "
    "row, not M-RoPE positions of four rows and the features of images. Long samples fit with --deepspeed "
    "configs/zero3.json (or zero3_offload.json), --gradient_checkpointing True and --data_flatten True."
)


def refuse_parallelism(deepspeed: Mapping[str, Any] | str | None) -> None:
    """Refuse settings that ask accelerate or DeepSpeed to split samples over devices.

    Args:
        deepspeed: Configuration of DeepSpeed, or its file.

    Raises:
        UserError: the environment (``accelerate launch`` sets it) or the DeepSpeed file asks for it.
    """
    asked = [*_by_environment(), *_by_deepspeed(read_settings(deepspeed, "deepspeed") if deepspeed else {})]
    if asked:
        raise UserError(f"{', '.join(asked)}: {_REASON}")


def reason_against(name: str) -> str:
    """Return why a setting of this name is not supported; empty if it does not split samples over devices."""
    return _REASON if name in _FLAGS else ""


def _by_environment() -> Iterator[str]:
    for variable in _VARIABLES.values():
        if os.environ.get(variable, "1") != "1":
            yield f"{variable}={os.environ[variable]} in the environment"


def _by_deepspeed(config: Mapping[str, Any]) -> Iterator[str]:
    section = config.get("tensor_parallel")
    tensor = section.get("autotp_size", section.get("tp_size", 1)) if isinstance(section, Mapping) else 1
    for name, size in (
        ("sequence_parallel_size", config.get("sequence_parallel_size", 1)),
        ("tensor_parallel.autotp_size", tensor),
    ):
        if size not in (0, 1):
            yield f"{name} {size} in the file of --deepspeed"
