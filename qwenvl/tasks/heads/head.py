"""A head on pooled hidden states, for classification, regression and ranking.

Like transformers' ``...ForSequenceClassification`` (a linear layer on the last token's hidden state), with a choice of
layer, pooling and an optional second linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from qwenvl.config.tasks import HeadKind, Pooling, TaskLoss, TaskName
from qwenvl.models.task_module import Readout, draw_normal
from qwenvl.tasks.heads.pooling import pool
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class HeadSpec:
    """Config of a head: the content of ``task.json``.

    Args:
        task: Name of the task.
        hidden_size: Hidden size of the model.
        outputs: Number of outputs: classes, numbers of a label, or 1 for the score of an image.
        pooling: Pooling of hidden states.
        hidden_layer: Index of the hidden states, as in transformers' ``hidden_states``.
        head: ``linear`` (one layer) or ``mlp`` (two).
        classes: Names of the classes, in the order of the outputs.
        loss: Training loss.
        class_weights: Weight of each class; empty for equal weights.
        focal_gamma: Gamma of focal loss.
        huber_delta: Delta of Huber's loss, in standard deviations.
        means: Mean of each number of the labels, which are normalised as (number - mean) / deviation.
        deviations: Standard deviation of each number of the labels.
        keep_answer: Whether the head sees the answer at the end of a sample.
    """

    task: TaskName
    hidden_size: int
    outputs: int
    pooling: Pooling
    hidden_layer: int = -1
    head: HeadKind = "linear"
    classes: tuple[str, ...] = ()
    loss: TaskLoss = "cross_entropy"
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 2.0
    huber_delta: float = 1.0
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()
    keep_answer: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> HeadSpec:
        """Read the content of ``task.json``.

        Raises:
            UserError: it does not describe a head.
        """
        names = {one.name for one in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        try:
            return cls(**{name: value for name, value in values.items() if name in names})
        except TypeError as error:
            raise UserError(f"task.json does not describe a head of this trainer: {error}.") from error


class _ExactLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input (float32 or float64), ignoring autocast."""

    def forward(self, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with exact:
            return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))


class TaskHead(Readout):
    """Pool hidden states of a layer and compute scores.

    Args:
        spec: Config of the head.
        seed: Seed of the initial weights: normal with a deviation of 0.02, as in transformers; biases are 0.
        learning_rate: Learning rate of the head; None for the run's.
    """

    def __init__(self, spec: HeadSpec, seed: int = 0, learning_rate: float | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.record = asdict(spec)
        self.learning_rate = learning_rate
        self.dense = _ExactLinear(spec.hidden_size, spec.hidden_size) if spec.head == "mlp" else nn.Identity()
        self.score = _ExactLinear(spec.hidden_size, spec.outputs)
        for number, layer in enumerate((self.dense, self.score)):
            if isinstance(layer, nn.Linear):
                draw_normal(layer.weight, 0.02, seed + number)
                nn.init.zeros_(layer.bias)
        self._wants_states = False
        self._states: Tensor | None = None

    def watch(self, language_model: nn.Module) -> Sequence[RemovableHandle]:
        """Hook the input of the layer above the chosen hidden states; the last hidden states are in the output."""
        layers: Any = language_model.layers
        number = layer_number(self.spec.hidden_layer, len(layers))
        if number == len(layers):
            return ()
        return (layers[number].register_forward_pre_hook(self._note_states, with_kwargs=True),)

    def unused(self, language_model: nn.Module) -> Sequence[nn.Module]:
        """Return the layers above the chosen hidden states."""
        layers: Any = language_model.layers
        number = layer_number(self.spec.hidden_layer, len(layers))
        return () if number == len(layers) else (*layers[number:], cast(nn.Module, language_model.norm))

    def _note_states(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del layer
        if self._wants_states:  # not when activation checkpointing recomputes the layer
            self._states, self._wants_states = args[0] if args else kwargs["hidden_states"], False

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare to collect the hidden states of the next forward pass."""
        del inputs
        self._wants_states, self._states = True, None
        return {}

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return scores [units, outputs], float32.

        Args:
            output: Output of the language model.
            inputs: ``rows`` and ``lengths`` of :class:`qwenvl.tasks.heads.pooling.PooledRows`.
        """
        states, self._states = self._states, None
        hidden: Tensor = output.last_hidden_state if states is None else states
        return self.scores(pool(hidden.flatten(0, 1), inputs["rows"], inputs["lengths"]))

    def scores(self, pooled: Tensor) -> Tensor:
        """Return scores [units, outputs] of pooled states [units, H]."""
        hidden = functional.gelu(self.dense(pooled)) if self.spec.head == "mlp" else pooled
        found: Tensor = self.score(hidden)
        return found


def layer_number(hidden_layer: int, layers: int) -> int:
    """Return the number of layers below the chosen hidden states, 0 to ``layers``.

    Raises:
        UserError: there is no such layer.
    """
    number = hidden_layer if hidden_layer >= 0 else layers + 1 + hidden_layer
    if not 0 <= number <= layers:
        raise UserError(
            f"--hidden_layer {hidden_layer}: the model has {layers} layers, so the value has to be from "
            f"{-layers - 1} to {layers}."
        )
    return number
