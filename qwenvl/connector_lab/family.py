"""The lab's record as a model family, and what makes transformers' Auto classes know its model.

:mod:`qwenvl.families` finds this module by the ``model_type`` of a checkpoint.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.connector_lab.config import MODEL_TYPE, LabConfig
from qwenvl.families import Family, ModelLayout

FAMILY = Family(MODEL_TYPE, video_layout="clip", plain_positions=True, layout=ModelLayout(patches=None, sharded=False))


def register() -> None:
    """Let ``AutoConfig``, ``AutoModelForImageTextToText`` and ``AutoProcessor`` open folders of the lab.

    What opens checkpoints here calls it. Elsewhere: ``from qwenvl.connector_lab.family import register; register()``.
    """
    from qwenvl.connector_lab.model import LabForConditionalGeneration
    from qwenvl.connector_lab.processor import LabProcessor

    AutoConfig.register(MODEL_TYPE, LabConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LabConfig, LabForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LabConfig, LabProcessor, exist_ok=True)
