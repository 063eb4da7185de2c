"""A task that is not in the package: the loss of DPO (Rafailov et al., arXiv 2305.18290) on pairs of answers.

It needs two forward passes of the model and two of a reference, the model as it was before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenvl.data.collator import Collator, for_model
from qwenvl.data.encoding.encoded import EncodedSample, Item, Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.tokenization import Tokens
from qwenvl.data.types import Conversation, Sample
from qwenvl.models.loss.causal_lm import prepare_inputs, run_model
from qwenvl.tasks.objective import Objective, Task
from qwenvl.tasks.registry import TaskKind
from qwenvl.utils.errors import SampleError

BETA = 0.5


@dataclass(frozen=True)
class RejectedReader:
    """Reads the field ``rejected``: the worse of two last answers."""

    encoder: SampleEncoder
    fields = ("rejected",)
    prompts = False
    reads_plan = True

    def check(self, sample: Sample, conversation: Conversation) -> None:
        del conversation
        if not isinstance(sample.record.get("rejected"), str):
            raise SampleError("no_pair", "the sample has no text 'rejected'.", sample.origin)

    def read(self, sample: Sample, plan: Plan) -> Tokens:
        """Return the tokens of the sample with its worse answer."""
        del plan
        *before, last = sample.record["conversations"]
        turns = [*before, {**last, "value": sample.record["rejected"]}]
        (other,) = self.encoder.plans(replace(sample, record={**sample.record, "conversations": turns}))
        return other.tokens

    def identity(self) -> list[Any]:
        return ["pairs"]


class PairLoss(Objective):
    """-log sigmoid(beta x how much more than the reference the model prefers the better answer), of each pair."""

    unit = "pairs"

    def begin(self, model: nn.Module) -> None:
        self.reference = deepcopy(model).requires_grad_(False).eval()

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        rejected = [Item((EncodedSample(tokens),)) for tokens in batch["sample_targets"]]
        other = for_model(Collator(0, flatten="cu_seq_lens_q" in batch)(rejected or [Item()]))
        shown = {name: batch[name] for name in ("pixels", "media") if name in batch}
        pairs = torch.arange(len(batch["sample_targets"]))
        return prepare_inputs(batch) | {"rejected": prepare_inputs(other | shown), "sample_of_unit": pairs}

    def count(self, batch: Mapping[str, Any]) -> int:
        return len(batch["sample_targets"])

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        better = {name: value for name, value in batch.items() if name != "rejected"}
        margin, outputs = preference(model, better, batch["rejected"])
        with torch.no_grad():
            before, _ = preference(self.reference, better, batch["rejected"])
        losses = -functional.logsigmoid(BETA * (margin - before))
        return losses.sum(), SimpleNamespace(unit_losses=losses.detach(), router_logits=outputs.get("router_logits"))

    def records(self, output: Any, batch: Mapping[str, Any]) -> list[float]:
        del batch
        return list(map(float, output.unit_losses))

    def metrics(self, records: Sequence[float]) -> dict[str, float]:
        return {"worst_pair": max(records)}


def preference(model: nn.Module, better: Mapping[str, Any], worse: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return by how much a model finds the better answer of each pair more likely, in nats, and the output for it."""
    (likely, outputs), (unlikely, _) = log_probabilities(model, better), log_probabilities(model, worse)
    return likely - unlikely, outputs


def log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return the log-probability of the answers of each sample, float32 [samples], and the model's output."""
    outputs = run_model(model, {**batch, "targets": None})
    places, targets = batch["kept_positions"], batch["targets"]
    found = -functional.cross_entropy(outputs.logits[0].float(), targets, reduction="none")
    if "cu_seq_lens_q" in batch:
        samples = torch.bucketize(places, batch["cu_seq_lens_q"][1:].long(), right=True)
    else:
        samples = places // batch["input_ids"].shape[1]
    return found.new_zeros(batch["num_samples"]).index_add(0, samples, found), outputs


def open_pairs(parsed: Any, config: Any, train: Any, held_out: Any, encoder: SampleEncoder) -> Task:
    """Return the task of a run, as :attr:`qwenvl.tasks.registry.TaskKind.open`."""
    del parsed, config, train, held_out
    return Task(PairLoss(), RejectedReader(replace(encoder, history="as_rendered")))


def read_pairs(chosen: Any, encoder: SampleEncoder | None) -> RejectedReader:
    """Return what reads pairs that are checked."""
    del chosen
    assert encoder is not None
    return RejectedReader(encoder)


PAIRS = TaskKind(open_pairs, read_pairs)
