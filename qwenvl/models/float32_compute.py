"""Run a half-precision model in float32, with the weights of one layer at a time converted.

Two implementations of the same model differ by rounding. In bfloat16, over the layers of a real model, logits differ by
hundredths of their standard deviation, as much as many a real mistake causes. In float32 they agree to 1e-5, and any
larger difference is one between the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def computing_in_float32(
    model: nn.Module,
    prepare: Callable[[nn.Module], None] = lambda layer: None,
    restore: Callable[[nn.Module], None] = lambda layer: None,
) -> Iterator[None]:
    """Compute in float32 while the context is open; only the layer that runs has its weights in float32.

    Needs the memory of the largest layer, the vocabulary's, in addition to the model.

    Args:
        model: Stock model, not sharded.
        prepare: Function of a layer, called before it runs, with its weights in float32; may change them.
        restore: Function of a layer, called after it ran, with its own weights back in place.
    """
    handles = []
    for layer in _layers(model):
        wide = _Widened(layer, prepare, restore)
        handles.append(layer.register_forward_pre_hook(wide.before, with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(wide.after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Widened:
    """The hooks around one layer."""

    def __init__(
        self, layer: nn.Module, prepare: Callable[[nn.Module], None], restore: Callable[[nn.Module], None]
    ) -> None:
        # also parameters that are in float32 already: `prepare` may change their values
        self.parameters = [parameter for parameter in layer.parameters() if parameter.dtype in (*_HALF, torch.float32)]
        self.prepare, self.restore = prepare, restore
        self.own: list[Tensor] = []

    def before(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.own = [parameter.data for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.prepare(layer)
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def after(self, layer: nn.Module, *_: Any) -> None:
        for parameter, own in zip(self.parameters, self.own, strict=True):
            parameter.data = own
        self.own = []
        self.restore(layer)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that run one after the other: entries of lists of layers, and modules without such a list.

    The innermost modules would not do, as some read the weights of others.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from _layers(child)
        else:
            yield child
