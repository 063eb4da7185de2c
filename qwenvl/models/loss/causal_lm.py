"""Inputs of the training loss, which is summed over trained tokens; :mod:`qwenvl.tasks.objective` divides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwenvl.models.attention.segments import Segments
from qwenvl.models.loss.moe_aux_loss import sample_of_tokens, summed_balance
from qwenvl.models.vision.inputs import VisionInputs

IGNORED_LABEL = -100
"""Label of a token that is not trained; ``torch.nn.functional.cross_entropy`` ignores it by default."""

_OWN_KEYS = frozenset(
    # attention_mask: rows are padded on the right, where causal attention never looks; stock models read it on the host
    "pixels media vision_rows vision_grids num_samples sample_targets total_weight num_units attention_mask "
    "sample_of_unit dataset_of_sample".split()
)


def prepare_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert a collated batch to model inputs; compute on the host what would otherwise force a device sync.

    ``labels`` become the trained positions and the tokens they predict. Position t predicts token t + 1, so it is kept
    if label t + 1 is trained. The last position of a sequence predicts nothing; nor does the last of each sample in a
    flattened row, as a sample's first label is never trained.

        labels     -100  -100    7    8  -100
        kept          .     x    x    .     .       kept_positions 1 2, targets 7 8

    Args:
        batch: Batch of the collator, on the host. ``labels`` int64 [B, T], -100 for tokens that are not trained;
            ``loss_weights`` float32 [B, T], factors of the tokens' loss, present if any is not 1.

    Returns:
        The batch without ``labels`` and ``loss_weights``, with ``kept_positions`` int64 [n], indices into the flattened
        rows; ``targets`` int64 [n]; ``sample_of_unit`` int64 [n], the place of each target's sample in the batch;
        ``segments``; and, if any is not 1, ``target_weights`` int32 [n]: float32 factors reinterpreted as integers,
        because DeepSpeed and FSDP2 round floating-point inputs to the model's type.
    """
    batch = dict(batch)
    labels: Tensor = batch.pop("labels")
    weights: Tensor | None = batch.pop("loss_weights", None)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    if weights is not None:
        batch["target_weights"] = weights[:, 1:][kept[:, :-1]].view(torch.int32)
    positions = kept.flatten().nonzero().squeeze(1)
    return batch | {
        "kept_positions": positions,
        "targets": labels[:, 1:][kept[:, :-1]],
        "sample_of_unit": _sample_of_positions(batch, positions, labels.shape[1]),
        "segments": segments_of(batch, labels),
    }


def _sample_of_positions(batch: Mapping[str, Any], positions: Tensor, width: int) -> Tensor:
    """Return the number of the sample in the batch of each of some positions in the flattened rows."""
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    if borders is None:
        return positions // width
    return torch.bucketize(positions, borders[1:].long(), right=True)


def sample_lengths(batch: Mapping[str, Any]) -> Tensor:
    """Return the number of tokens of each usable sample of a batch of the collator: int64 [samples]."""
    mask: Tensor | None = batch.get("attention_mask")
    lengths = mask.sum(1) if mask is not None else batch["cu_seq_lens_q"].diff().long()
    return lengths[: batch["num_samples"]]


def count_targets(batch: Mapping[str, Any]) -> int:
    """Return the number of trained tokens in a batch of the collator."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def total_weight(batch: Mapping[str, Any]) -> float:
    """Return the sum of the trained tokens' weights in a batch of the collator; their number if all weights are 1."""
    weights: Tensor | None = batch.get("loss_weights")
    return count_targets(batch) if weights is None else float(weights[:, 1:].double().sum())


def segments_of(batch: Mapping[str, Any], labels: Tensor) -> Segments:
    """Return the segments of a batch's rows, for attention; the batch is on the host, its labels are [B, T]."""
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    return Segments(tuple(borders.diff().tolist()) if borders is not None else (labels.shape[1],))


@dataclass(frozen=True, slots=True)
class Balance:
    """Settings of the auxiliary loss of a mixture of experts in an optimizer step.

    Args:
        coefficient: Weight of the auxiliary loss (``--router_aux_loss_coef``).
        top_k: Number of experts per token.
        num_tokens: Number of tokens in the optimizer step, over all ranks and accumulation steps, without padding.
    """

    coefficient: float
    top_k: int
    num_tokens: Tensor | float


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of tokens in the usable samples of a batch on the host."""
    if not batch["num_samples"]:
        return 0
    mask: Tensor | None = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a batch that was prepared for a model; return the model's output.

    Args:
        model: Model after :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: Result of :func:`prepare_inputs`: ``input_ids`` int64 [B, T], ``position_ids`` int64 [4, B, T],
            ``vision_rows`` int64 [n], the indices of the visual tokens in the flattened rows; ``kept_positions``,
            ``targets`` and ``segments``; ``pixels`` and ``media`` with media (see
            :class:`~qwenvl.models.vision.inputs.VisionInputs`), ``attention_mask`` if padded, ``cu_seq_lens_q`` and the
            like if flattened. Or one with ``readout_inputs`` in place of kept positions and targets. With
            ``output_router_logits``, the output holds ``router_logits`` of a mixture of experts.
    """
    return model(
        **{key: value for key, value in batch.items() if key not in _OWN_KEYS},
        vision_inputs=VisionInputs(
            batch.get("pixels"), batch.get("media", ()), batch["vision_rows"], batch.get("vision_grids")
        ),
        use_cache=False,  # with a cache, transformers does not detect packed samples, and they would see each other
    )


def with_balance(loss: Tensor, output: Any, batch: Mapping[str, Any], balance: Balance | None) -> Tensor:
    """Return the loss of a batch plus its part of the auxiliary loss, if there is one."""
    if balance is None:
        return loss
    auxiliary = summed_balance(output.router_logits, balance.top_k, *sample_of_tokens(batch))
    weight = balance.coefficient * bool(batch["num_samples"])  # 0 for a batch that only fills a step
    return loss + weight * auxiliary / balance.num_tokens


class GradientWatch:
    """Finds trainable parameters that the loss does not reach.

    It records gradients when they are computed, so that it works if they are freed or moved before the optimizer's
    step (DeepSpeed), and with DDP and gradient checkpointing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[str] = set()
        self._handles = [self._watch(name, value) for name, value in self._trainable()]

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self._model.named_parameters() if value.requires_grad]

    def _watch(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        def note(_: Tensor) -> None:
            self._seen.add(name)

        handle: RemovableHandle = parameter.register_hook(note)
        return handle

    def missing(self) -> list[str]:
        """Return the names of the trainable parameters that have had no gradient since the watch began.

        Call it before gradients are cleared: FSDP2 replaces the watched parameters by sharded ones, whose ``.grad`` is
        checked instead.
        """
        return [name for name, value in self._trainable() if name not in self._seen and value.grad is None]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
