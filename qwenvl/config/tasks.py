"""Flags of tasks other than language modelling, and of the module that is trained for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qwenvl.config.grounding import GroundingArguments
from qwenvl.utils.errors import UserError

TaskName = Literal["classification", "regression", "multilabel", "ranking", "grounding"]
Pooling = Literal["last_non_pad", "first", "mean", "vision_mean"]
HeadKind = Literal["linear", "mlp"]
TaskLoss = Literal["cross_entropy", "focal", "mse", "huber", "bce", "pairwise", "listnet"]

LOSSES: dict[TaskName, tuple[TaskLoss, ...]] = {
    "classification": ("cross_entropy", "focal"),
    "regression": ("mse", "huber"),
    "multilabel": ("bce", "focal"),
    "ranking": ("pairwise", "listnet"),
    "grounding": (),
}
"""The losses of each task that has a choice; the first is the default."""

METRICS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "multilabel": ("map", "micro_f1", "macro_f1"),
    "regression": ("mae", "rmse", "r2"),
    "ranking": ("pairwise_accuracy", "ndcg", "kendall_tau"),
    "grounding": ("miou", "ciou", "acc_at_50", "miou_whole"),
}
"""Metrics of each task that the best checkpoint can be chosen by, besides the loss."""


@dataclass
class TaskArguments(GroundingArguments):
    """Flags of tasks. Every field is explained by its ``help``.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    task: TaskName | None = field(
        default=None,
        metadata={
            "help": "Train a head on pooled hidden states for the field 'label' of the samples, instead of language: "
            "classification (a name or whole number), regression (a number or a list of them), multilabel (a list of "
            "names), ranking (a list with a relevance for each image of the sample). grounding trains one on the "
            "attention of a frozen model, for the field 'masks': the parts of an image that phrases of an answer name."
        },
    )
    hidden_layer: int = field(
        default=-1,
        metadata={
            "help": "Hidden states that the head reads, as transformers numbers them: 0 the embeddings, 1 after the "
            "first layer, -1 after the last layer and the final norm."
        },
    )
    pooling: Pooling | None = field(
        default=None,
        metadata={
            "help": "Hidden states that the head reads: of the last token, of the first one, the mean of all tokens, "
            "or the mean of the tokens of images and videos. ranking reads each image separately. Default: "
            "last_non_pad; vision_mean for ranking."
        },
    )
    head: HeadKind = field(
        default="linear", metadata={"help": "linear: one layer; mlp: two layers with GELU between them."}
    )
    head_lr: float | None = field(default=None, metadata={"help": "Learning rate of the head. Default: learning_rate."})
    class_names: str | None = field(
        default=None,
        metadata={"help": "File with the classes in order, one per line. Default: the classes in the data."},
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "balanced: weights inverse to class frequency; or weights by name, such as cat=2,dog=0.5, others 1."
        },
    )
    task_loss: TaskLoss | None = field(
        default=None,
        metadata={
            "help": "classification: cross_entropy or focal; regression: mse or huber; multilabel: bce or focal; "
            "ranking: pairwise or listnet. Default: the first of them."
        },
    )
    focal_gamma: float = field(
        default=2.0,
        metadata={"help": "Exponent of the focal loss; larger values put more weight on misclassified samples."},
    )
    huber_delta: float = field(
        default=1.0, metadata={"help": "Error at which huber becomes linear, in standard deviations of the labels."}
    )
    keep_answer: bool = field(
        default=False,
        metadata={
            "help": "Let the head see the answer at the end of a sample, to rate it. Otherwise the answer is left out, "
            "because it may hold the label."
        },
    )

    def __post_init__(self) -> None:
        if self.task is not None and self.task_loss not in (None, *LOSSES[self.task]):
            allowed = " or ".join(LOSSES[self.task]) or "one of its own"
            raise UserError(f"--task_loss {self.task_loss} is none of --task {self.task}, which has {allowed}.")
        if self.focal_gamma < 0 or self.huber_delta <= 0:
            raise UserError("--focal_gamma must be 0 or more, and --huber_delta above 0.")
        if self.head_lr is not None and self.head_lr <= 0:
            raise UserError(f"--head_lr {self.head_lr:g} must be above 0.")
        if self.class_weights is not None and self.task not in (None, "classification", "multilabel"):
            raise UserError(f"--class_weights: --task {self.task} has no classes. Leave it out.")
        if self.class_names is not None and self.task not in (None, "classification", "multilabel"):
            raise UserError(f"--class_names: --task {self.task} has no classes. Leave it out.")
        self.weights_by_name()
        self.check_grounding()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the task, besides the loss; none without a task."""
        return () if self.task is None else METRICS[self.task]

    @property
    def chosen_pooling(self) -> Pooling:
        """Pooling of hidden states."""
        return self.pooling or ("vision_mean" if self.task == "ranking" else "last_non_pad")

    @property
    def chosen_loss(self) -> TaskLoss:
        """The loss of the task."""
        assert self.task is not None
        return self.task_loss or LOSSES[self.task][0]

    def weights_by_name(self) -> dict[str, float]:
        """Return the weights of ``--class_weights cat=2,dog=0.5``; nothing for ``balanced``.

        Raises:
            UserError: the text has another form.
        """
        found: dict[str, float] = {}
        for item in (self.class_weights or "").split(",") if self.class_weights != "balanced" else ():
            name, _, number = item.rpartition("=")
            if not item:
                continue
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name or not 0 <= weight < math.inf:
                raise UserError(f"--class_weights {item!r}: write balanced, or name=weight, such as cat=2,dog=0.5.")
            found[name.strip()] = weight
        return found
