"""The training loss: cross entropy summed over trained tokens, divided by a count that the caller gives."""

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
"""Label of a token that is not trained; what ``torch.nn.functional.cross_entropy`` leaves out by default."""

_OWN_KEYS = frozenset({"pixels", "media", "vision_mask", "num_vision_tokens", "num_samples", "sample_targets"})


def tell_host(batch: dict[str, Any]) -> dict[str, Any]:
    """Make of a batch what the model takes, and add what would have to be read from the device later.

    ``labels`` become the positions that are trained and the tokens they predict. Position t predicts token t + 1, so it
    is kept where label t + 1 is trained. The last position of a sequence predicts nothing; in a flattened row neither
    does the last of each sample, as a sample's first label is never trained.

        labels     -100  -100    7    8  -100
        kept          .     x    x    .     .       kept_positions 1 2, targets 7 8

    Args:
        batch: of the collator, on the host; ``labels`` int64 [B, T], -100 where a token is not trained;
            ``loss_weights`` float32 [B, T], factors of the tokens' loss, where any is not 1.

    Returns:
        The batch without ``labels`` and ``loss_weights``, with ``kept_positions`` int64 [n], in the batch's rows one
        after another; ``targets`` int64 [n]; ``target_weights`` int32 [n], their factors in the bits of float32, which
        no engine rounds on the way to the model as it does with numbers (DeepSpeed, FSDP2), where any is not 1; and
        ``segments``.
    """
    batch = dict(batch)
    labels: Tensor = batch.pop("labels")
    weights: Tensor | None = batch.pop("loss_weights", None)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    if weights is not None:
        batch["target_weights"] = weights[:, 1:][kept[:, :-1]].view(torch.int32)
    return batch | {
        "kept_positions": kept.flatten().nonzero().squeeze(1),
        "targets": labels[:, 1:][kept[:, :-1]],
        "segments": segments_of(batch, labels),
    }


def count_targets(batch: Mapping[str, Any]) -> int:
    """Return the trained tokens of a batch of the collator."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def total_weight(batch: Mapping[str, Any]) -> float:
    """Return the weights of the trained tokens of a batch of the collator, added up: their number where all are 1."""
    weights: Tensor | None = batch.get("loss_weights")
    return count_targets(batch) if weights is None else float(weights[:, 1:].double().sum())


def segments_of(batch: Mapping[str, Any], labels: Tensor) -> Segments:
    """Return where the samples of a batch's rows are, for attention; of a batch on the host with its labels [B, T]."""
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    return Segments(tuple(borders.diff().tolist()) if borders is not None else (labels.shape[1],))


@dataclass(frozen=True, slots=True)
class Balance:
    """How the auxiliary loss of a mixture of experts counts in an optimizer step.

    Args:
        coefficient: its weight (``--router_aux_loss_coef``).
        top_k: experts that a token is sent to.
        num_tokens: tokens of the optimizer step, over all ranks and accumulation steps, without padding.
    """

    coefficient: float
    top_k: int
    num_tokens: Tensor | float


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Return the tokens of a batch's usable samples; of a batch on the host."""
    if not batch["num_samples"]:
        return 0
    mask: Tensor | None = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def causal_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    num_trained_tokens: Tensor | float,
    balance: Balance | None = None,
) -> Tensor:
    """Run a batch and return its part of the loss.

    The vocabulary projection runs on the trained positions only. A batch without a trained token gives zero, still
    connected to every parameter, so that a rank that holds one takes part in each collective.

    Args:
        model: a model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: from :func:`tell_host`: ``input_ids`` int64 [B, T], ``position_ids`` int64 [4, B, T], ``vision_mask``
            bool [B, T] and ``num_vision_tokens``, the number of True in it; ``kept_positions``, ``targets`` and
            ``segments``; ``pixels`` and ``media`` where it holds media (see
            :class:`~qwenvl.models.vision.inputs.VisionInputs`), ``attention_mask`` if padded, ``cu_seq_lens_q`` and the
            like if flattened.
        num_trained_tokens: what to divide by: the trained tokens (:func:`total_weight`) of the whole optimizer step,
            over all ranks and accumulation steps, so that the parts' sum does not depend on the split.
        balance: adds the auxiliary loss of a mixture of experts.

    Returns:
        float32 scalar: sum of weight x cross entropy over the batch's trained tokens, in nats, /
        ``num_trained_tokens``; with ``balance``, plus its coefficient x the batch's auxiliary loss summed over tokens /
        ``num_tokens``.
    """
    if balance is not None:
        batch = {**batch, "output_router_logits": True}
    output = run_model(model, batch)
    # without our head a stock model takes the arguments it does not know without a word
    assert output.logits.dim() == 0, "call qwenvl.models.forward.install first"
    return with_balance(output.logits / num_trained_tokens, output, batch, balance)


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a batch that was prepared for a model; return the model's output.

    Args:
        model: a model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: as for :func:`causal_loss`, or with ``readout_inputs`` in the place of its kept positions and targets.
            With ``output_router_logits``, the output holds ``router_logits`` of a mixture of experts.
    """
    return model(
        **{key: value for key, value in batch.items() if key not in _OWN_KEYS},
        vision_inputs=VisionInputs(
            batch.get("pixels"), batch.get("media", ()), batch["vision_mask"], batch["num_vision_tokens"]
        ),
        use_cache=False,  # with a cache, transformers does not look for packed samples and lets them see each other
    )


def with_balance(loss: Tensor, output: Any, batch: Mapping[str, Any], balance: Balance | None) -> Tensor:
    """Return the loss of a batch plus its part of the auxiliary loss, where there is one."""
    if balance is None:
        return loss
    auxiliary = summed_balance(output.router_logits, balance.top_k, *sample_of_tokens(batch))
    weight = balance.coefficient * bool(batch["num_samples"])  # a batch that only fills a step has no say
    return loss + weight * auxiliary / balance.num_tokens


class GradientWatch:
    """Finds trainable parameters that the loss does not reach.

    Counts a gradient when it is computed, so it works where gradients are freed or moved before the optimizer's step
    (DeepSpeed) and through DDP and gradient checkpointing.
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
        """Names of the trainable parameters that have had no gradient since the watch began.

        FSDP2 puts other parameters, sharded ones, in the place of those that are watched: their ``.grad`` is looked at.
        Ask before the gradients are cleared.
        """
        return [name for name, value in self._trainable() if name not in self._seen and value.grad is None]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
