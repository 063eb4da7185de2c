"""Peaks of devices by the names that drivers give them."""

from __future__ import annotations

import pytest
import torch

from qwenvl.profiling.device_specs import known_peak, name_device, parse_gpus

# Names as torch.cuda.get_device_name returns them; dense bfloat16 TFLOP/s.
NAMES = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H20": 148,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "AMD Instinct MI300X": 1307.4,
}


@pytest.mark.parametrize(("name", "teraflops"), NAMES.items())
def test_a_device_is_known_by_the_name_of_its_driver(name: str, teraflops: float) -> None:
    assert known_peak(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_what_is_another_device_has_no_peak(name: str) -> None:
    assert known_peak(name) is None


def test_the_cpu_is_called_so() -> None:
    assert name_device(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100-80G", (8, "H100", 80, 989.5)),
        ("h200", (1, "h200", 141, 989.5)),
        ("64x A100-40GB", (64, "A100", 40, 312)),
        ("2xRTX-4090", (2, "RTX-4090", 24, 165.2)),
        ("4xL4-24G", (4, "L4", 24, 121)),
    ],
)
def test_gpus_are_read_from_a_text(text: str, expected: tuple[int, str, int, float]) -> None:
    found = parse_gpus(text)
    assert (found.count, found.name, found.memory, found.peak / 1e12) == expected


@pytest.mark.parametrize(
    ("name", "gib"),  # torch's total_memory, from messages about memory that ran out
    [("L40S", 44.4), ("RTX-4090", 23.64), ("H100", 79.1), ("H200", 139.8), ("T4", 14.75)],
)
def test_no_more_memory_is_counted_than_there_is(name: str, gib: float) -> None:
    assert 0.9 * gib < parse_gpus(name).usable / 2**30 <= gib
