"""Peaks of devices by the names that drivers give them."""

from __future__ import annotations

import pytest
import torch

from qwenvl.profiling.device_specs import known_peak, name_device

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
