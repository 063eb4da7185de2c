"""A head on pooled hidden states, for classes, numbers and ranks.

As transformers' ``...ForSequenceClassification`` (a linear layer on the last token's state), with a choice of layer,
pooling and a second layer.
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
    """Everything that a head is, but its weights: what ``task.json`` holds.

    Args:
        task: what it predicts.
        hidden_size: of the model.
        outputs: numbers that it gives: classes, numbers of a label, or 1 for the score of a picture.
        pooling: of hidden states.
        hidden_layer: which ones, as transformers numbers them.
        head: one layer or two.
        classes: names, in the order of the outputs.
        loss: that it was trained with.
        class_weights: of each class; none where all weigh alike.
        focal_gamma: of focal loss.
        huber_delta: of Huber's loss, in ``deviations``.
        means: of the numbers of the labels, which are learned as (number - mean) / deviation.
        deviations: of the same.
        keep_answer: it sees the answer at the end of a sample.
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
        """Read what ``task.json`` holds.

        Raises:
            UserError: it is not that of a head.
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
    """A linear layer that computes in float32 (float64 where it is given that), whatever autocast and weights say."""

    def forward(self, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with exact:
            return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))


class TaskHead(Readout):
    """Pools hidden states of a layer and computes scores.

    Args:
        spec: what it is.
        seed: of its first weights: normal with a deviation of 0.02, as in transformers; biases are 0.
        learning_rate: of its own; None for the run's.
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
        """Watch what goes into the layer above the chosen hidden states; the last ones are in the output."""
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
        if self._wants_states:  # not when checkpointing computes the layer again
            self._states, self._wants_states = args[0] if args else kwargs["hidden_states"], False

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for the hidden states of the next call."""
        del inputs
        self._wants_states, self._states = True, None
        return {}

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return scores [units, outputs], float32.

        Args:
            output: of the language model.
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
    """Return how many layers the chosen hidden states have passed, 0 to ``layers``.

    Raises:
        UserError: there is no such layer.
    """
    number = hidden_layer if hidden_layer >= 0 else layers + 1 + hidden_layer
    if not 0 <= number <= layers:
        raise UserError(f"--hidden_layer {hidden_layer}: the model has {layers} layers: {-layers - 1} to {layers}.")
    return number
