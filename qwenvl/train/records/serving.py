"""Template arguments that requests to a server need to match training (``serving.json``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenvl.data.conversation.chat_template import SWITCH
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import DatasetSpec

SERVING = "serving.json"
"""File of a saved folder with the template arguments for requests to a server."""


def describe_serving(encoder: SampleEncoder, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """Return the record that becomes ``serving.json``.

    Args:
        encoder: Encoder of the run.
        specs: Training datasets.

    Returns:
        ``chat_template_kwargs``: template arguments of every request. ``datasets``: template arguments of single
        datasets, which override them. ``enable_thinking``: ``auto`` if it was on for answers with a thought and off for
        those without, the given value, or None for a template without the switch. ``history``: trained contexts.
    """
    kwargs = {key: value for key, value in encoder.template.kwargs.items() if (key, value) != (SWITCH, "auto")}
    own = {spec.name: dict(spec.options.get("chat_template_kwargs") or {}) for spec in specs}
    return {
        "chat_template_kwargs": kwargs,
        "datasets": {name: given for name, given in own.items() if given},
        SWITCH: kwargs.get(SWITCH, "auto") if encoder.template.has_switch else None,
        "history": encoder.history,
    }
