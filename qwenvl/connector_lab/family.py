"""The lab's ``Family``, and its registration with the Auto classes of transformers.

:mod:`qwenvl.families` imports this module by the ``model_type`` of a checkpoint.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.connector_lab.config import MODEL_TYPE, LabConfig
from qwenvl.families import Family, ModelLayout

FAMILY = Family(MODEL_TYPE, video_layout="clip", plain_positions=True, layout=ModelLayout(patches=None, sharded=False))


def register() -> None:
    """Register the lab with ``AutoConfig``, ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    This package calls it before it opens a checkpoint. Other programs have to call it themselves:
    ``from qwenvl.connector_lab.family import register; register()``.
    """
    from qwenvl.connector_lab.model import LabForConditionalGeneration
    from qwenvl.connector_lab.processor import LabProcessor

    AutoConfig.register(MODEL_TYPE, LabConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LabConfig, LabForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LabConfig, LabProcessor, exist_ok=True)
