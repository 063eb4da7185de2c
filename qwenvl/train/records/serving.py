"""How a server has to be asked for what was trained: the template arguments of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenvl.data.conversation.chat_template import SWITCH
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import DatasetSpec

SERVING = "serving.json"
"""File of a saved folder that says how requests to a server have to be made."""


def describe_serving(encoder: SampleEncoder, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """Return the record that becomes ``serving.json``.

    Args:
        encoder: Encoder of the run.
        specs: Training datasets.

    Returns:
        ``chat_template_kwargs``: Template arguments of every request. ``datasets``: those of single datasets, over
        them. ``enable_thinking``: ``auto`` where it was on for answers with a thought and off for those without, the
        value that was given, or None for a template without the switch. ``history``: Contexts that were trained.
    """
    kwargs = {key: value for key, value in encoder.template.kwargs.items() if (key, value) != (SWITCH, "auto")}
    own = {spec.name: dict(spec.options.get("chat_template_kwargs") or {}) for spec in specs}
    return {
        "chat_template_kwargs": kwargs,
        "datasets": {name: given for name, given in own.items() if given},
        SWITCH: kwargs.get(SWITCH, "auto") if encoder.template.has_switch else None,
        "history": encoder.history,
    }
