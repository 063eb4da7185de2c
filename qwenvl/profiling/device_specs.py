"""Kinds of GPUs: peak speed, the reference of model FLOPs utilisation (MFU), and sizes of memory.

Sources of both: NVIDIA's data sheets of data centre GPUs; for RTX the appendices of its white papers on Blackwell, Ada
and GA102; AWS for the A10G; AMD's data sheets of Instinct, where a MI250X is two devices. Peaks are dense bfloat16
matrix products with float32 sums (data sheets print twice as much if they assume sparsity); of V100 and T4, float16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qwenvl.utils.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of GPU.

    Args:
        name: Words that all occur in the driver's name of the device.
        peak: Peak in TFLOP/s.
        memory: Sizes of memory in which it is sold, in GB.
    """

    name: str
    peak: float
    memory: tuple[int, ...]


_DEVICES: tuple[Device, ...] = (
    Device("GB300", 2500.0, (288,)),
    Device("GB200", 2500.0, (192,)),
    Device("B300", 2250.0, (288,)),
    Device("B200", 2250.0, (192,)),
    Device("H200 NVL", 835.5, (141,)),
    Device("H200", 989.5, (141,)),
    Device("GH200", 989.5, (96, 144)),
    Device("H100 NVL", 835.5, (94,)),
    Device("H100 PCIe", 756.5, (80,)),
    Device("H100", 989.5, (80,)),
    Device("H800 PCIe", 756.5, (80,)),
    Device("H800", 989.5, (80,)),
    Device("H20", 148.0, (96, 141)),
    Device("A100", 312.0, (40, 80)),
    Device("A800", 312.0, (40, 80)),
    Device("A40", 149.7, (48,)),
    Device("A30", 165.0, (24,)),
    Device("A10", 125.0, (24,)),
    Device("A10G", 70.0, (24,)),
    Device("L40S", 362.05, (48,)),
    Device("L40", 181.05, (48,)),
    Device("L4", 121.0, (24,)),
    Device("RTX 5090", 209.5, (32,)),
    Device("RTX 6000 Ada", 364.2, (48,)),
    Device("RTX A6000", 154.8, (48,)),
    Device("RTX 4090", 165.2, (24,)),
    Device("RTX 3090", 71.0, (24,)),
    Device("V100 PCIE", 112.0, (16, 32)),
    Device("V100", 125.0, (16, 32)),
    Device("T4", 65.0, (16,)),
    Device("MI325X", 1307.4, (256,)),
    Device("MI300X", 1307.4, (192,)),
    Device("MI250X", 191.5, (64,)),
)
"""The first one whose words all occur in a name counts."""
_OTHER_KINDS = {"mig", "laptop", "ti", "d"}
"""Words of a slice of a GPU, or of a smaller or larger GPU with the same number."""


_USABLE = 0.92
"""GiB that a program sees for each GB of the data sheet, at least: torch finds 44.4 on an L40S of 48 GB."""


@dataclass(frozen=True, slots=True)
class GpuSet:
    """A number of GPUs of one kind.

    Args:
        count: Number of GPUs.
        name: Name of their kind, as it was given.
        memory: Memory of each, in GB of the data sheet.
        peak: Peak of each, in dense bfloat16 operations per second.
    """

    count: int
    name: str
    memory: int
    peak: float

    @property
    def usable(self) -> int:
        """Bytes of each GPU that a program can use."""
        return usable_bytes(self.memory)


def usable_bytes(memory: int) -> int:
    """Return the bytes that a program can use of a GPU whose data sheet says so many GB."""
    return int(memory * _USABLE * 2**30)


def known_peak(device_name: str) -> float | None:
    """Return the peak of a device, in dense bfloat16 operations per second; None if it is not known.

    Args:
        device_name: Name from ``torch.cuda.get_device_name``, such as ``NVIDIA A100-SXM4-80GB``.
    """
    device = _find(device_name)
    return None if device is None else 1e12 * device.peak


def _find(device_name: str) -> Device | None:
    words = set(re.split(r"[\s-]+", device_name.lower()))
    if words & _OTHER_KINDS:
        return None
    return next((device for device in _DEVICES if words.issuperset(device.name.lower().split())), None)


def parse_gpus(text: str, flag: str = "--gpus") -> GpuSet:
    """Return the GPUs that a text such as ``8xH100-80G`` or ``H200`` names.

    Args:
        text: Number, ``x``, kind, and the size of memory where the kind has several.
        flag: Name of the flag, for messages.

    Raises:
        UserError: The text is not in this form, or names an unknown kind or size of memory.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*(\S.*?)(?:[-\s](\d+)\s*GB?)?", text.strip(), re.IGNORECASE)
    if found is None or found[1] == "0":
        raise UserError(f"{flag} {text!r}: write number, kind and memory of the GPUs, such as 8xH100-80G.")
    name, device = found[2], _find(found[2])
    if device is None:
        names = [one.name.replace(" ", "-") for one in _DEVICES]
        raise UserError(f"{flag} {text!r}: the kind {name!r} is none of {', '.join(names)}.{nearest(name, names)}")
    sizes = [int(found[3])] if found[3] else [*device.memory]
    if len(sizes) > 1 or sizes[0] not in device.memory:
        written = " or ".join(f"{found[1] or 1}x{name}-{size}G" for size in device.memory)
        raise UserError(
            f"{flag} {text!r}: {device.name} has {' or '.join(map(str, device.memory))} GB. Write {written}."
        )
    return GpuSet(int(found[1] or 1), name, sizes[0], 1e12 * device.peak)


def name_device(device: torch.device) -> str:
    """Return the driver's name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
