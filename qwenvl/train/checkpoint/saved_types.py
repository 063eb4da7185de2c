"""Data types of the weights of a finished model (``--save_dtype``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from qwenvl.train.checkpoint.folder_check import DTYPES, Header


@dataclass(frozen=True)
class SavedTypes:
    """Data type of each tensor in the files of a finished model.

    Args:
        asked: Value of ``--save_dtype``. ``auto`` is the type that the tensor has in the starting checkpoint, or that
            of most of its weights for a tensor that it does not have, but never a wider one than in training.
        source: Tensors of the starting checkpoint; empty where their types say nothing, as those of a base about its
            adapters.
    """

    asked: str = "auto"
    source: Mapping[str, Header] = field(default_factory=dict)

    def of(self, name: str, own: torch.dtype) -> torch.dtype:
        """Return the type in which a tensor is saved.

        Args:
            name: Name of the tensor in the files.
            own: Its type in training.
        """
        if self.asked != "auto":
            return _dtype(self.asked)
        header = self.source.get(name)
        found = _dtype(DTYPES[header.dtype]) if header and header.dtype in DTYPES else self._usual
        return found if found is not None and found.itemsize < own.itemsize else own

    def usual(self, own: torch.dtype) -> torch.dtype:
        """Return the type of most weights, which stands in the config, of a model that was trained in ``own``."""
        return self.of("", own)

    def possible(self, name: str, own: torch.dtype) -> set[torch.dtype]:
        """Return the types that a tensor may be saved in, where ``name`` is its name in the model.

        The same as in the files for the families whose checkpoints hold more than one type.
        """
        names = [name] if name in self.source or self.asked != "auto" else ["", *self._one_of_each]
        return {self.of(one, own) for one in names}

    @cached_property
    def _usual(self) -> torch.dtype | None:
        sizes: Counter[str] = Counter()
        for header in self.source.values():
            sizes[header.dtype] += torch.Size(header.shape).numel() if header.dtype in DTYPES else 0
        found = sizes.most_common(1)
        return _dtype(DTYPES[found[0][0]]) if found and found[0][1] else None

    @cached_property
    def _one_of_each(self) -> list[str]:
        return list({header.dtype: name for name, header in self.source.items() if header.dtype in DTYPES}.values())


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
