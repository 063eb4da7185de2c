"""The parts of a model, where the record of its family (:mod:`qwenvl.families`) says that they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwenvl.families import ModelLayout, get_family


def layout_of(model: Any) -> ModelLayout:
    """Return where the parts of a stock ``...ForConditionalGeneration`` are."""
    return get_family(model.config.model_type).layout


def vision_tower(model: Any) -> Any:
    """Return the vision tower, its mergers included."""
    return model.get_submodule(layout_of(model).vision)


def mergers(model: Any) -> list[nn.Module]:
    """Return what makes tokens of the tower's features: the merger, and those of earlier layers (DeepStack)."""
    return [model.get_submodule(path) for path in layout_of(model).mergers]


def language_model(model: Any) -> Any:
    """Return the language model without its projection to the vocabulary."""
    return model.get_submodule(layout_of(model).language)


def decoder_layers(model: Any) -> Any:
    """Return the layers of the language model, a ``ModuleList``."""
    return language_model(model).layers


def output_head(model: Any) -> Any:
    """Return the projection to the vocabulary."""
    return model.get_submodule(layout_of(model).head)
