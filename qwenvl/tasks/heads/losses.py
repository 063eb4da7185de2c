"""The losses of heads. Each sample has its own, so that they do not depend on how batches are split.

Cross entropy; focal loss (Lin et al., 2017, "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 4;
without its alpha, which class weights stand for); squared error; Huber's loss (Huber, 1964); binary cross entropy of
each class; and for ranking, inside each sample, the pairwise logistic loss (Burges et al., 2005, "Learning to Rank
using Gradient Descent", RankNet) or ListNet's (Cao et al., 2007, "Learning to Rank: From Pairwise Approach to Listwise
Approach", top-one probabilities).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwenvl.tasks.heads.head import HeadSpec
from qwenvl.utils.devices import copy_to_device


def sample_losses(spec: HeadSpec, scores: Tensor, targets: Sequence[Any]) -> Tensor:
    """Return the loss of each sample, float32 [samples] (float64 for scores of it).

    Args:
        spec: Config of the head.
        scores: [units, outputs].
        targets: Target of each sample, from :class:`qwenvl.tasks.heads.labels.LabelReader`.
    """
    losses: dict[str, Callable[[HeadSpec, Tensor, Sequence[Any]], Tensor]] = {
        "classification": _of_classes,
        "multilabel": _of_labels,
        "regression": _of_numbers,
        "ranking": _of_ranks,
    }
    return losses[spec.task](spec, scores, targets)


def _like(scores: Tensor, numbers: Sequence[float]) -> Tensor:
    """Return numbers with the dtype and device of scores, copied without a wait."""
    return copy_to_device(torch.tensor(list(numbers), dtype=scores.dtype), scores.device)


def _of_classes(spec: HeadSpec, scores: Tensor, targets: Sequence[int]) -> Tensor:
    """Return w_y (1 - p_y)^gamma (-log p_y); unlike in torch's mean, it is not divided by the weights."""
    wanted = copy_to_device(torch.tensor(list(targets)), scores.device)
    loss = functional.cross_entropy(scores, wanted, reduction="none")
    if spec.loss == "focal":
        loss = (1 - (-loss).exp()) ** spec.focal_gamma * loss
    if spec.class_weights:
        loss = loss * _like(scores, spec.class_weights)[wanted]
    return loss


def _of_labels(spec: HeadSpec, scores: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean over classes of each sample; class weights apply to the positive labels only."""
    wanted = many_hot(targets, spec.outputs, scores)
    loss = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    if spec.loss == "focal":
        loss = (1 - (-loss).exp()) ** spec.focal_gamma * loss
    if spec.class_weights:
        loss = torch.where(wanted > 0, loss * _like(scores, spec.class_weights), loss)
    return loss.mean(1)


def many_hot(targets: Sequence[Sequence[int]], classes: int, like: Tensor) -> Tensor:
    """Return [samples, classes], 1 where a sample has a class, with the dtype and device of ``like``."""
    wanted = torch.zeros(len(targets), classes)
    for row, names in enumerate(targets):
        wanted[row, list(names)] = 1
    return copy_to_device(wanted.to(like.dtype), like.device)


def _of_numbers(spec: HeadSpec, scores: Tensor, targets: Sequence[Sequence[float]]) -> Tensor:
    """Return the mean over the numbers of each sample's label, in standard deviations."""
    wanted = torch.tensor(list(targets), dtype=torch.float64)
    wanted = (wanted - torch.tensor(spec.means)) / torch.tensor(spec.deviations)
    wanted = copy_to_device(wanted.to(scores.dtype), scores.device)
    if spec.loss == "huber":
        loss = functional.huber_loss(scores, wanted, reduction="none", delta=spec.huber_delta)
    else:
        loss = (scores - wanted).square()
    return loss.mean(1)


def _of_ranks(spec: HeadSpec, scores: Tensor, targets: Sequence[Sequence[float]]) -> Tensor:
    """Return the ranking loss among the images of each sample."""
    parts = scores.squeeze(1).split([len(one) for one in targets])
    of_sample = listnet if spec.loss == "listnet" else pairwise
    return torch.stack([of_sample(part, _like(part, one)) for part, one in zip(parts, targets, strict=True)])


def pairwise(scores: Tensor, relevances: Tensor) -> Tensor:
    """Return the mean of log(1 + exp(s_j - s_i)) over the pairs in which i is more relevant than j; both [n]."""
    more = (relevances[:, None] > relevances[None, :]).to(scores.dtype)
    return (functional.softplus(scores[None, :] - scores[:, None]) * more).sum() / more.sum()


def listnet(scores: Tensor, relevances: Tensor) -> Tensor:
    """Return the cross entropy of softmax(scores) against softmax(relevances), both [n]."""
    return -(relevances.softmax(0) * scores.log_softmax(0)).sum()
