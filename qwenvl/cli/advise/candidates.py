"""Candidates of settings, best first, and their command lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qwenvl.config import ParsedArguments, parse_arguments

_WHOLE = {"tune_mm_llm": True, "tune_mm_mlp": True, "tune_mm_vision": True, "learning_rate": "1e-5"}
_LORA = {
    "lora_enable": True,
    "lora_target": "language,experts",
    "lora_r": 64,
    "lora_alpha": 128,
    "tune_mm_llm": False,
    "tune_mm_mlp": True,
    "tune_mm_vision": False,
    "learning_rate": "1e-4",
    "mm_projector_lr": "1e-5",
}
KINDS: dict[str, dict[str, Any]] = {
    "all parts": _WHOLE,
    "language, merger": {**_WHOLE, "tune_mm_vision": False},
    "merger": {**_WHOLE, "tune_mm_vision": False, "tune_mm_llm": False},
    "LoRA": _LORA,
    "QLoRA": {**_LORA, "quantization_bit": 4},
}
"""Flags of what is trained. LoRA has the values of the recipes ``configs/lora_*.yaml``."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A way to spread a run over GPUs.

    Args:
        name: Name for display.
        flags: Flags that choose it.
        offloads: Whether it keeps weights and optimizer in host memory, which slows every step down.
    """

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    offloads: bool = False


_PLAIN, _DDP = Engine("one process"), Engine("DDP")
_OFFLOAD = Engine("ZeRO-3 offload", {"deepspeed": "configs/zero3_offload.json"}, offloads=True)
_ZERO2 = Engine("ZeRO-2", {"deepspeed": "configs/zero2.json"})
_SHARDED = (
    Engine("ZeRO-3", {"deepspeed": "configs/zero3.json"}),
    Engine("FSDP2", {"fsdp": True, "fsdp_config": "configs/fsdp2.json"}),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings of a run.

    Args:
        kind: Kind of training, a key of :data:`KINDS`.
        engine: Engine.
        recompute: Whether gradient checkpointing is on.
        pack: Tokens of a pack; a micro-batch is one pack.
        accumulation: Micro-batches of an optimizer step.
        gpus: Number of GPUs.
    """

    kind: str
    engine: Engine
    recompute: bool
    pack: int
    accumulation: int
    gpus: int

    def flags(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return all flags of the run.

        Args:
            common: Flags of model, data and length of the run.
        """
        chosen = {
            "data_packing": True,
            "model_max_length": self.pack,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": True,
        }
        recompute = {"gradient_checkpointing": True} if self.recompute else {}
        return {**common, **KINDS[self.kind], **chosen, **recompute, **self.engine.flags}


def candidates(kind: str, gpus: int, packs: Sequence[int], step_tokens: int, *, sharded: bool) -> Iterator[Candidate]:
    """Yield the candidates of a kind, best first.

    The longest pack comes first; then whole weights on each GPU before sharded ones, and these before offloaded ones;
    then what keeps activations before what computes them twice.

    Args:
        kind: Kind of training, a key of :data:`KINDS`.
        gpus: Number of GPUs.
        packs: Tokens of a pack, best first.
        step_tokens: Tokens of an optimizer step over all GPUs, about.
        sharded: Whether the family's weights may be sharded.
    """
    for pack in packs:
        accumulation = max(1, round(step_tokens / (pack * gpus)))
        for engines in _engines(kind, gpus, sharded=sharded):
            for recompute in (False, True) if pack == packs[0] else (True,):  # packs shrink only once all else failed
                for engine in engines:
                    yield Candidate(kind, engine, recompute, pack, accumulation, gpus)


def _engines(kind: str, gpus: int, *, sharded: bool) -> Iterator[Sequence[Engine]]:
    """Yield groups of engines; quantized weights cannot be sharded, and one GPU shards nothing."""
    splits = sharded and "quantization_bit" not in KINDS[kind]
    if gpus == 1:
        yield (_PLAIN,)
    else:
        yield (_DDP, *((_ZERO2,) if splits else ()))
    if splits:
        yield from ((_SHARDED,) if gpus > 1 else ())
        yield (_OFFLOAD,)


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as a command line."""
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def parse_for(flags: Mapping[str, Any], gpus: int) -> ParsedArguments:
    """Parse flags as training does, which checks them against each other, as a dry run for other devices.

    Args:
        flags: Flags of a run.
        gpus: Number of GPUs.

    Raises:
        UserError: The trainer would refuse the flags.
    """
    parsed = parse_arguments(as_arguments({**flags, "dry_run": True, "dry_run_devices": gpus, "report_to": "none"}))
    unset_hf_deepspeed_config()  # or models would be built sharded across ranks that do not exist
    return parsed


def command_line(flags: Mapping[str, Any], gpus: int, machine: int) -> str:
    """Return the command that starts a run.

    Args:
        flags: Flags of the run.
        gpus: Number of GPUs.
        machine: GPUs of a machine; more of them take several machines, each with its own ``NODE_RANK``.
    """
    nodes = -(-gpus // machine)
    launcher = f"NPROC_PER_NODE={gpus // nodes} bash scripts/launch.sh"
    if nodes > 1:
        launcher = f"NNODES={nodes} NODE_RANK=$RANK MASTER_ADDR=$HOST {launcher}"
    return f"{launcher} {shlex.join(as_arguments(flags))}"
