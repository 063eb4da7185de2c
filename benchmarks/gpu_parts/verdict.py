"""The report: a table of every part, and a verdict by target."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_parts.base import Row
from qwenvl.profiling.device_specs import known_peak

_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "deepspeed", "flash-attn", "liger-kernel", "bitsandbytes"),
    *("triton", "causal-conv1d", "flash-linear-attention"),
)
_H100 = 989.5e12
"""Peak of the device that the targets in tokens per second are for."""


def describe_machine() -> Row:
    """Return device and versions."""
    cuda = torch.cuda.is_available()
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": gpu.name if gpu else platform.processor() or "CPU",
        "memory_gib": round(gpu.total_memory / 2**30, 2) if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
    }


def verdicts(items: Mapping[str, Row], device: str) -> Iterator[tuple[str, str, str]]:
    """Yield (target, what was found, verdict) of each target: met, missed, or not measured.

    Args:
        items: Results by ``part/item``.
        device: Name of the device.
    """
    for part, target in (
        ("doctor", "the doctor finds the machine ready"),
        ("equality", "CPU and GPU agree in float32 within 1e-3, each family"),
        ("waits", "no wait of the host in a micro-batch, each family"),
        ("engines", "each engine: stopped by SIGTERM and resumed, it ends like one that was not stopped"),
        ("methods", "every installed method trains"),
        ("attention", "all kinds of attention agree, gradients too"),
    ):
        rows = [row for name, row in items.items() if name.startswith(f"{part}/") and row["status"] != "skipped"]
        good = sum(bool(row.get("passed")) for row in rows)
        yield target, f"{good} of {len(rows)}" if rows else "", _said(good == len(rows)) if rows else "not measured"
    share = (known_peak(device) or _H100) / _H100
    for target, value, bound, least in _speeds(items, share):
        found = "" if value is None else f"{value:,.3g}"
        met = value is not None and (value >= bound if least else value <= bound)
        yield target, found, "not measured" if value is None else _said(met)


def _said(met: bool) -> str:
    return "met" if met else "missed"


def _speeds(items: Mapping[str, Row], share: float) -> Iterator[tuple[str, float | None, float, bool]]:
    """Yield (target, value, bound, whether the bound is a least value)."""
    speed = "tokens_a_second"
    yield "8B, packs of 8k, all parts: MFU at least 0.5", _value(items, "step/8b ours", "mfu"), 0.5, True
    for size, least in (("8b", 9_400), ("4b", 15_800)):
        target = f"{size.upper()}: at least {least * share:,.0f} tokens/s ({least:,} on an H100)"
        yield target, _value(items, f"step/{size} ours", speed), least * share, True
    mixture = _ratio(items, ("step/8b ours", "mfu"), ("step/8b ours text", "mfu"))
    yield "image mixtures reach 0.9 of the MFU of text", mixture, 0.9, True
    for size in ("2b", "8b"):
        ours, stock = f"step/{size} ours", f"step/{size} plain"
        trained = _ratio(items, (ours, "trained_tokens_a_second"), (stock, "trained_tokens_a_second"))
        yield f"{size.upper()}: at least 2 x the stock path's trained tokens/s", trained, 2.0, True
        memory = _ratio(items, (ours, "peak_gib"), (stock, "peak_gib"))
        yield f"{size.upper()}: at most 0.6 x the stock path's peak memory", memory, 0.6, False
    for run in ("2b", "8b", "8b LoRA"):
        ratio = _value(items, f"train/{run}", "peak_over_predicted")
        distance = None if ratio is None else abs(ratio - 1)
        yield f"{run}: dry run within 0.1 of the measured peak", distance, 0.1, False


def _value(items: Mapping[str, Row], item: str, name: str) -> float | None:
    value = items.get(item, {}).get(name)
    return None if value is None else float(value)


def _ratio(items: Mapping[str, Row], one: tuple[str, str], other: tuple[str, str]) -> float | None:
    left, right = _value(items, *one), _value(items, *other)
    return left / right if left and right else None


def ratios(items: Mapping[str, Row]) -> dict[str, float]:
    """Return speed and memory of our steps over those of others at the same size, by a description."""
    found = {}
    for size in ("2b", "8b"):
        for other, called in (("plain", "stock path"), ("sorted", "stock path, sorted"), ("ours loop", "ours, loop")):
            for name, what in (("trained_tokens_a_second", "trained tokens/s"), ("peak_gib", "peak memory")):
                ratio = _ratio(items, (f"step/{size} ours", name), (f"step/{size} {other}", name))
                if ratio is not None:
                    found[f"{size.upper()}: {what}, ours over {called}"] = round(ratio, 3)
    return found


def as_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# One GPU", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["machine"].items() if value is not None]
    lines += ["", "| target | found | verdict |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in report["verdicts"]]
    if report["ratios"]:
        lines += ["", "| ratio | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in report["ratios"].items()]
    lines += ["", "| part | item | result | figures | seconds |", "|---|---|---|---|---|"]
    for name, row in report["items"].items():
        part, _, item = name.partition("/")
        lines.append(f"| {part} | {item} | {row['status']} | {_figures(row)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _figures(row: Row) -> str:
    """Return the figures of a row in a cell; of an error, its last line."""
    if "error" in row:
        return str(row["error"]).strip().splitlines()[-1].replace("|", "\\|")[:300]
    hidden = ("status", "seconds", "passed")
    shown = (
        f"{name} {_number(value)}" for name, value in row.items() if name not in hidden and value not in (None, [])
    )
    return ", ".join(shown).replace("|", "\\|")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
