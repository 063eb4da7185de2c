"""Checksums of weights: equal for equal bytes, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwenvl.models.fingerprints import checksum, differing, fingerprints, listed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_change_of_a_tensor_is_seen(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    last_digit = weight.clone()
    last_digit[3, 4] = torch.nextafter(last_digit[3, 4], torch.tensor(9.0, dtype=dtype))
    changed = [weight.T, weight.flip(0), torch.zeros_like(weight), last_digit, -weight]
    assert checksum(weight) == checksum(weight.T.contiguous().T)
    assert len({checksum(weight), *map(checksum, changed)}) == 6


def test_a_tensor_may_be_opened_wider_but_not_narrower() -> None:
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    known = fingerprints(model, torch.bfloat16)
    wide = {name: value.float() for name, value in model.named_parameters()}
    narrow = {name: value.bfloat16() for name, value in wide.items()}
    assert differing(known, wide) == []
    assert differing(fingerprints(model.float(), torch.float32), narrow) == ["weight", "bias"]
    wide["weight"] = wide["weight"] * (1 + 2**-7)
    assert differing(known, wide) == ["weight"]


def test_a_float32_tensor_may_be_opened_in_the_type_of_the_others() -> None:
    model = nn.Linear(4, 3)
    known = fingerprints(model, torch.bfloat16)
    narrow = {name: value.bfloat16() for name, value in model.named_parameters()}
    assert differing(known, narrow) == []
    assert differing(known, narrow | {"bias": narrow["bias"] + 1}) == ["bias"]


def test_missing_tensors_differ() -> None:
    found: dict[str, Tensor] = {}
    assert differing({"a": {"float32": 1}}, found) == ["a"]
    assert listed(["f", "e", "d", "c", "b", "a"]) == "a, b, c, d and 2 more"
