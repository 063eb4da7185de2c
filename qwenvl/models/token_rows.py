"""Trainable rows for added tokens in an otherwise frozen vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = "rows"
"""Last component of the name of every such parameter."""


class RowsEmbedding(nn.Embedding):
    """An embedding with some rows in a parameter of their own.

    Its weight keeps its name and its values; ``rows`` replaces the embeddings of ``row_ids``.

    Args:
        embedding: Stock layer.
        row_ids: Ids of the trainable tokens, without repeats.
        rows: [len(row_ids), H].
    """

    def __init__(self, embedding: nn.Embedding, row_ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.row_ids = list(row_ids)
        self.rows = rows
        self.row_index: Tensor
        self.register_buffer("row_index", index_of(row_ids, embedding.weight), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [..., H] of int64 ids [...]."""
        embeddings = super().forward(input_ids)
        matches = input_ids.unsqueeze(-1) == self.row_index
        rows = functional.embedding(matches.int().argmax(-1), self.rows).to(embeddings.dtype)
        return torch.where(matches.any(-1, keepdim=True), rows, embeddings)


def index_of(row_ids: Sequence[int], weight: Tensor) -> Tensor:
    """Return row numbers as int64 [n] on the device of a weight, for a buffer: a tensor made in a step waits for it."""
    return torch.tensor(row_ids, device=weight.device)


def with_rows(weight: Tensor, row_index: Tensor, rows: Tensor) -> Tensor:
    """Return a vocabulary's weight [V, H] with some rows replaced by ``rows``, which receive their gradients."""
    return weight.index_copy(0, row_index, rows.to(weight.dtype))


def is_row(name: str) -> bool:
    """Whether a parameter of this name holds rows of a vocabulary."""
    return name.rpartition(".")[2] == ROWS


def row_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of the layers that hold such rows; of tied layers only the first."""
    found, seen = [], set()
    for name, module in model.named_modules():
        rows = module._parameters.get(ROWS)
        if rows is not None and id(rows) not in seen:
            seen.add(id(rows))
            found.append((name, module))
    return found
