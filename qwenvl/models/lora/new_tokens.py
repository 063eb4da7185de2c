"""Added tokens: enlarge the vocabulary if needed, initialise their rows, and train only those rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwenvl.models.loss.fused_lm_head import LossHead
from qwenvl.models.parts import output_head
from qwenvl.models.token_rows import RowsEmbedding
from qwenvl.models.trainable.sharded_params import gather_params
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

_MULTIPLE = 128
"""An enlarged vocabulary stays a multiple of this, if it was one, because matrix products are faster then."""


def make_room(model: PreTrainedModel, new_ids: Sequence[int], *, may_grow: bool) -> None:
    """Give added tokens rows in embeddings and output projection, initialised to the mean of all earlier tokens.

    Checkpoints have more rows than tokens, so the vocabulary rarely grows. Tied matrices stay tied.

    Args:
        model: Model before :func:`qwenvl.models.forward.install`; changed in place.
        new_ids: Ids of the added tokens, consecutive; all lower ids belong to earlier tokens.
        may_grow: Whether the matrices may get more rows.

    Raises:
        UserError: They would have to grow, and may not.
    """
    if not new_ids:
        return
    size = _num_rows(model.get_input_embeddings())
    if max(new_ids) >= size:
        if not may_grow:
            raise UserError(
                f"--additional_tokens: the vocabulary of this checkpoint has room for {size - min(new_ids)} more, "
                f"not {len(new_ids)}. Adapters cannot enlarge it: add fewer, or train with --tune_mm_llm True."
            )
        multiple = math.gcd(size, _MULTIPLE)
        model.resize_token_embeddings(max(new_ids) + 1, pad_to_multiple_of=multiple, mean_resizing=False)
        logger.info("The vocabulary grows from %d to %d rows.", size, _num_rows(model.get_input_embeddings()))
    for matrix in _matrices(model):
        with gather_params(matrix, changed=True), torch.no_grad():
            matrix[list(new_ids)] = matrix[: min(new_ids)].mean(0)  # summed in float32


def train_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Make the rows of some tokens trainable while the rest of the vocabulary is frozen.

    Args:
        model: Model after :func:`qwenvl.models.forward.install`; changed in place.
        ids: Ids of the tokens.
    """
    embedding, head = model.get_input_embeddings(), output_head(model)
    assert isinstance(head, LossHead)
    tied = head.weight is embedding.weight
    rows = _copy_rows(embedding.weight, ids)
    model.set_input_embeddings(RowsEmbedding(embedding, ids, rows))
    head.train_rows(ids, rows if tied else _copy_rows(head.weight, ids))


def _copy_rows(weight: Tensor, ids: Sequence[int]) -> nn.Parameter:
    with gather_params(weight):
        return nn.Parameter(weight.detach()[list(ids)].clone())


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the embeddings and, if it is not tied, the output projection."""
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embeddings] if embeddings is output else [embeddings, output]


def _num_rows(embedding: nn.Module) -> int:
    weight: Any = embedding.weight
    size: int = getattr(weight, "ds_shape", weight.shape)[0]
    return size
