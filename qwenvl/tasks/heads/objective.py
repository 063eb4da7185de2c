"""Classification, regression, multilabel and ranking as objectives: a unit is a sample with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qwenvl.models.loss.causal_lm import run_model, segments_of
from qwenvl.tasks.heads.confusion import confusion_svg
from qwenvl.tasks.heads.head import HeadSpec, TaskHead, layer_number
from qwenvl.tasks.heads.losses import sample_losses
from qwenvl.tasks.heads.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    ranking_metrics,
    regression_metrics,
)
from qwenvl.tasks.heads.pooling import pooled_rows, token_places
from qwenvl.tasks.objective import Objective

FIGURE = "confusion_matrix.svg"


class HeadObjective(Objective):
    """Objective of a :class:`~qwenvl.tasks.heads.head.TaskHead`.

    Args:
        spec: Config of the head.
        seed: Seed of the initial weights.
        learning_rate: Learning rate of the head; None for the run's.
    """

    unit = "labelled_samples"

    def __init__(self, spec: HeadSpec, seed: int = 0, learning_rate: float | None = None) -> None:
        self.spec = spec
        self._seed = seed
        self._learning_rate = learning_rate

    def build_readout(self, config: PretrainedConfig) -> TaskHead:
        """Return the head.

        Raises:
            UserError: the model has no such layer.
        """
        layer_number(self.spec.hidden_layer, config.get_text_config().num_hidden_layers)
        return TaskHead(self.spec, self._seed, self._learning_rate)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the positions of the hidden states to pool; see :meth:`Objective.prepare`."""
        batch = dict(batch)
        batch["segments"] = segments_of(batch, batch.pop("labels"))
        mask = np.zeros(batch["input_ids"].numel(), bool)
        mask[batch["vision_rows"].numpy()] = True
        by_image = self.spec.task == "ranking"
        pooled = pooled_rows(self.spec.pooling, token_places(batch), mask, by_image=by_image)
        return batch | {
            "readout_inputs": {"rows": pooled.rows, "lengths": pooled.lengths},
            "sample_of_unit": torch.arange(len(batch["sample_targets"])),
        }

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of samples of a batch."""
        return len(batch["sample_targets"])

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the loss summed over the samples of a batch, and the model's output with the head's scores."""
        output = run_model(model, batch)
        if not batch["sample_targets"]:
            output.unit_losses = output.logits.new_zeros(0)
            return output.logits.sum(), output  # zero that is still connected to the graph
        losses = sample_losses(self.spec, output.logits, batch["sample_targets"])
        output.unit_losses = losses.detach()
        return losses.sum(), output

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the scores of the samples of a batch, [units, outputs]."""
        found: Tensor = run_model(model, batch).logits
        return found

    def records(self, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Return (scores float64 [units of the sample, outputs], target) of each sample."""
        targets = batch["sample_targets"]
        scores = output.logits.double().cpu().numpy()
        units = [len(one) if self.spec.task == "ranking" else 1 for one in targets]
        return list(zip(np.split(scores, np.cumsum(units)[:-1]) if targets else [], targets, strict=True))

    def metrics(self, records: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of the task; empty without records."""
        if not records:
            return {}
        scores, targets = [one for one, _ in records], [target for _, target in records]
        if self.spec.task == "ranking":
            return ranking_metrics([one[:, 0] for one in scores], [np.array(one) for one in targets])
        rows = np.concatenate(scores)
        if self.spec.task == "classification":
            return classification_metrics(rows.argmax(1), np.array(targets))
        if self.spec.task == "regression":
            return regression_metrics(values(self.spec, rows), np.array(targets))
        expected = np.zeros(rows.shape, bool)
        for row, names in enumerate(targets):
            expected[row, list(names)] = True
        return multilabel_metrics(probabilities(self.spec, rows), expected)

    def draw(self, records: Sequence[Any], folder: Path) -> None:
        """Write the confusion matrix of a classification."""
        if self.spec.task == "classification" and records:
            predicted = np.concatenate([one for one, _ in records]).argmax(1)
            expected = np.array([target for _, target in records])
            counts = confusion_matrix(predicted, expected, self.spec.outputs)
            (folder / FIGURE).write_text(confusion_svg(counts, self.spec.classes), encoding="utf-8")


def probabilities(spec: HeadSpec, scores: np.ndarray) -> np.ndarray:
    """Return the probability of each class, [n, classes]: softmax for classification, else sigmoid."""
    if spec.task == "classification":
        powers = np.exp(scores - scores.max(1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(1, keepdims=True)
        return shares
    likely: np.ndarray = 0.5 * (1 + np.tanh(0.5 * scores))
    return likely


def values(spec: HeadSpec, scores: np.ndarray) -> np.ndarray:
    """Return the numbers that a regression predicts, [n, numbers]: scores with the normalisation undone."""
    found: np.ndarray = scores * np.array(spec.deviations) + np.array(spec.means)
    return found


def describe_scores(spec: HeadSpec, scores: np.ndarray) -> dict[str, Any]:
    """Return the prediction of one sample, as JSON values.

    Args:
        spec: Config of the head.
        scores: [units of the sample, outputs].

    Returns:
        ``label``, and beside it ``probabilities`` of each class by name (classification, multilabel) or ``scores`` and
        ``order``, the indices of the images, best first, from 0 (ranking). ``label`` of regression is a number, or
        a list of several.
    """
    if spec.task == "ranking":
        order = np.argsort(-scores[:, 0], kind="stable")
        return {"label": order.tolist(), "scores": scores[:, 0].tolist(), "order": order.tolist()}
    if spec.task == "regression":
        numbers = values(spec, scores)[0].tolist()
        return {"label": numbers if spec.outputs > 1 else numbers[0]}
    likely = probabilities(spec, scores)[0]
    by_name = dict(zip(spec.classes, likely.tolist(), strict=True))
    if spec.task == "classification":
        return {"label": spec.classes[int(likely.argmax())], "probabilities": by_name}
    return {"label": [name for name, one in by_name.items() if one >= 0.5], "probabilities": by_name}
