"""Peak speeds of devices from data sheets, the reference of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

import torch

# Words of the driver's device name -> TFLOP/s of dense bfloat16 matrix products with float32 sums (data sheets print
# twice as much if they assume sparsity). The first line whose words all occur in the name counts. Sources: NVIDIA's
# data sheets of data centre GPUs; for RTX the appendices of its white papers on Blackwell, Ada and GA102; AWS for the
# A10G; AMD's data sheets of Instinct, where a MI250X is two devices. V100 and T4: float16.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("GH200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("H800 PCIe", 756.5),
    ("H800", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("A10G", 70.0),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100 PCIE", 112.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),
)
_OTHER_KINDS = {"mig", "laptop", "ti", "d"}
"""Words of a slice of a GPU, or of a smaller or larger GPU with the same number."""


def known_peak(device_name: str) -> float | None:
    """Return the peak of a device, in dense bfloat16 operations per second; None if it is not known.

    Args:
        device_name: Name from ``torch.cuda.get_device_name``, such as ``NVIDIA A100-SXM4-80GB``.
    """
    words = set(re.split(r"[\s-]+", device_name.lower()))
    if words & _OTHER_KINDS:
        return None
    return next((1e12 * peak for name, peak in _PEAKS if words.issuperset(name.lower().split())), None)


def name_device(device: torch.device) -> str:
    """Return the driver's name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
