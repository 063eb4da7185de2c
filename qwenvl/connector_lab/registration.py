"""Makes transformers' Auto classes know the lab's model."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.connector_lab.config import MODEL_TYPE, LabConfig


def register() -> None:
    """Let ``AutoConfig``, ``AutoModelForImageTextToText`` and ``AutoProcessor`` open folders of the lab.

    What opens checkpoints here calls it. Elsewhere: ``from qwenvl.connector_lab.registration import register;
    register()``.
    """
    from qwenvl.connector_lab.model import LabForConditionalGeneration
    from qwenvl.connector_lab.processor import LabProcessor

    AutoConfig.register(MODEL_TYPE, LabConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LabConfig, LabForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LabConfig, LabProcessor, exist_ok=True)
