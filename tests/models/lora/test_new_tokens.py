"""Room for added tokens, their start, and rows that train alone."""

from __future__ import annotations

import pytest
import torch

from qwenvl.models.lora.new_tokens import _num_rows, make_room, train_rows
from qwenvl.models.loss.fused_lm_head import LossHead
from qwenvl.models.token_rows import RowsEmbedding
from qwenvl.utils.errors import UserError
from tests.patches import install

TIED = ["qwen3_vl", "qwen3_vl_moe"]  # the first has one matrix, the second two


def matrices(model):
    found = {id(one): one for one in (model.get_input_embeddings().weight, model.lm_head.weight)}
    return list(found.values())


@pytest.mark.parametrize("family", TIED)
def test_new_rows_start_as_the_mean_of_the_rows_of_tokens(family, load_tiny):
    """Rows behind the last token were never trained: they have no part in it, and stay as they are."""
    model = load_tiny(family)
    size = len(model.get_input_embeddings().weight)
    first = size - 6
    with torch.no_grad():
        for matrix in matrices(model):
            matrix[first:] = 1000.0
    before = [matrix.detach().clone() for matrix in matrices(model)]
    make_room(model, [first, first + 1], may_grow=False)
    assert len(matrices(model)) == len(before) == 1 + (family == "qwen3_vl_moe")
    for old, new in zip(before, matrices(model), strict=True):
        torch.testing.assert_close(new[first : first + 2], old[:first].mean(0).expand(2, -1))
        assert torch.equal(new[:first], old[:first]) and torch.equal(new[first + 2 :], old[first + 2 :])


def test_the_mean_is_exact_in_half_precision(load_tiny):
    model = load_tiny("qwen3_vl").bfloat16()
    matrix = model.lm_head.weight
    make_room(model, [700], may_grow=False)
    assert torch.equal(matrix[700], matrix[:700].float().mean(0).bfloat16())


def test_partitioned_matrices_have_the_rows_of_the_whole():
    """ZeRO-3 leaves a flat empty tensor, with the shape beside it."""
    embedding = torch.nn.Embedding(1, 4)
    assert _num_rows(embedding) == 1
    embedding.weight.ds_shape = torch.Size([50, 4])
    assert _num_rows(embedding) == 50


def test_no_new_tokens_change_nothing(load_tiny):
    model = load_tiny("qwen3_vl")
    before = model.lm_head.weight.detach().clone()
    make_room(model, [], may_grow=False)
    assert torch.equal(model.lm_head.weight, before)


def test_the_last_row_is_room_and_the_next_one_is_not(load_tiny):
    model = load_tiny("qwen3_vl")
    size = len(model.get_input_embeddings().weight)
    make_room(model, [size - 2, size - 1], may_grow=False)
    assert len(model.get_input_embeddings().weight) == size
    with pytest.raises(UserError, match="has room for 2 more, not 3"):
        make_room(model, [size - 2, size - 1, size], may_grow=False)


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("odd", [0, 1])
def test_a_vocabulary_grows_to_the_multiple_that_it_has(family, odd, load_tiny):
    model = load_tiny(family)
    if odd:  # of no multiple of two
        model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 1, mean_resizing=False)
    size = len(model.get_input_embeddings().weight)
    multiple = 1 if odd else 64  # of the number of rows, up to 128
    assert size % (2 * multiple) == multiple
    before = model.get_input_embeddings().weight.detach().clone()
    make_room(model, range(size - 2, size + 3), may_grow=True)
    wanted = size + 3 if odd else size + 64
    assert [len(matrix) for matrix in matrices(model)] == [wanted] * (1 + (family == "qwen3_vl_moe"))
    assert model.config.get_text_config().vocab_size == wanted
    grown = model.get_input_embeddings().weight
    assert torch.equal(grown[: size - 2], before[: size - 2])
    torch.testing.assert_close(grown[size - 2 : size + 3], before[: size - 2].mean(0).expand(5, -1))


@pytest.mark.parametrize("family", TIED)
def test_rows_that_train_alone_are_shared_where_the_matrices_are(family, load_tiny):
    model = load_tiny(family).requires_grad_(False)
    install(model)
    weight, ids = model.get_input_embeddings().weight, [5, 3]
    train_rows(model, ids)
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(embedding, RowsEmbedding) and isinstance(head, LossHead)
    assert embedding.weight is weight and embedding.row_ids == head.row_ids == ids
    assert (head.rows is embedding.rows) == (family == "qwen3_vl")
    assert torch.equal(embedding.rows, weight[ids]) and torch.equal(head.rows, head.weight[ids])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == (1 if family == "qwen3_vl" else 2)
    with torch.no_grad():
        embedding.rows += 1  # a copy: the frozen weight stays
    assert not torch.equal(embedding.rows, weight[ids])
