"""Submodules of a model, found by the layout in the record of its family (:mod:`qwenvl.families`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwenvl.families import ModelLayout, get_family


def layout_of(model: Any) -> ModelLayout:
    """Return the paths of the submodules of a stock ``...ForConditionalGeneration``."""
    return get_family(model.config.model_type).layout


def vision_tower(model: Any) -> Any:
    """Return the vision tower, its mergers included."""
    return model.get_submodule(layout_of(model).vision)


def mergers(model: Any) -> list[nn.Module]:
    """Return the modules that project the tower's features to tokens: the merger, and DeepStack's mergers."""
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
