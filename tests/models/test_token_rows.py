"""Rows of added tokens: each token finds its own, and nothing else of the vocabulary has a gradient."""

from __future__ import annotations

import torch
from torch import nn

from qwenvl.models.loss.fused_lm_head import LossHead
from qwenvl.models.token_rows import ROWS, RowsEmbedding, is_row, row_layers, with_rows

ROW_IDS = [7, 3, 5]  # not in ascending order


def new_rows() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).view(3, 4) + 100)


def test_every_added_token_takes_its_own_row_and_gives_it_the_gradient() -> None:
    embedding, rows = nn.Embedding(10, 4, padding_idx=0), new_rows()
    layer = RowsEmbedding(embedding, ROW_IDS, rows)
    ids = torch.tensor([[3, 1, 7], [5, 7, 9]])
    found = layer(ids)
    assert torch.equal(found[0], torch.stack([rows[1], embedding.weight[1], rows[0]]))
    assert torch.equal(found[1], torch.stack([rows[2], rows[0], embedding.weight[9]]))
    found.sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == [2, 1, 1]
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.any(1).nonzero().flatten().tolist() == [1, 9]


def test_the_layer_has_the_weight_of_the_one_it_stands_for() -> None:
    embedding = nn.Embedding(10, 4, padding_idx=2, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    layer = RowsEmbedding(embedding, ROW_IDS, new_rows())
    assert torch.equal(torch.get_rng_state(), before), "a weight of its own was made and drawn, for nothing"
    assert layer.weight is embedding.weight
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (10, 4, 2)
    assert layer(torch.tensor([3])).dtype == torch.bfloat16, "rows in float32 beside a base in bfloat16"


def test_a_weight_with_rows_passes_gradients_to_the_rows_alone() -> None:
    weight, rows = torch.zeros(10, 4, dtype=torch.float64), new_rows()
    changed = with_rows(weight, torch.tensor(ROW_IDS), rows)
    assert changed.dtype == torch.float64 and not weight.any()
    assert torch.equal(changed[ROW_IDS], rows.double())
    assert changed.any(1).nonzero().flatten().tolist() == sorted(ROW_IDS)
    (changed * torch.arange(10.0)[:, None]).sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == ROW_IDS


def test_layers_with_rows_are_found_and_tied_ones_once() -> None:
    assert is_row(f"model.embed_tokens.{ROWS}") and is_row(ROWS)
    assert not is_row("model.embed_tokens.weight") and not is_row(f"{ROWS}.weight")
    embedding, projection = nn.Embedding(10, 4), LossHead(nn.Linear(4, 10, bias=False))
    tied = new_rows()
    model = nn.ModuleDict({"embed": RowsEmbedding(embedding, ROW_IDS, tied), "other": nn.Linear(4, 4)})
    model["head"] = projection
    assert row_layers(model) == [("embed", model["embed"])]
    projection.train_rows(ROW_IDS, tied)
    assert row_layers(model) == [("embed", model["embed"])]
    projection.train_rows(ROW_IDS, new_rows())
    assert row_layers(model) == [("embed", model["embed"]), ("head", projection)]
