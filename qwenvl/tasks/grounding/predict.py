"""Masks and maps of a model that is opened from a folder, for samples, and what a batch of them has to say to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional

from qwenvl.data.collator import Collator, for_model
from qwenvl.data.encoding.encoded import EncodedSample, Item
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.inference.generate import Answerer, Decoding, generate, open_answerer
from qwenvl.inference.prompts import Prompt
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.attention.probe import AttentionProbe, Look
from qwenvl.models.forward import install
from qwenvl.models.loss.causal_lm import run_model, tell_host
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks import files as task_files
from qwenvl.tasks.grounding.module import GroundingReadout, mapped_layers
from qwenvl.tasks.grounding.phrases import MaskReader, Place, working_size

Size = tuple[int, ...]
Places = Sequence[Sequence[Place]]


USAGE = """from qwenvl.tasks.grounding.predict import open_grounder  # of this trainer

# The model alone opens as usual, with AutoModelForImageTextToText, and answers as before. tools/show_attention.py draws
# what its words look at, and the masks.

grounder = open_grounder("{name}")"""
"""Lines of a model card."""


@dataclass(frozen=True)
class Grounder:
    """A model folder, opened to see where the words of answers look, and to find masks where it has learned to.

    Args:
        answerer: the model, which ``generate`` can be asked, and its processor.
        readout: what ``--task grounding`` trained; None for a folder without it.
    """

    answerer: Answerer
    readout: GroundingReadout | None

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have maps: those of full attention, from 0."""
        return mapped_layers(self.answerer.model.config)

    def ask(self, prompt: Prompt, decoding: Decoding) -> str:
        """Return the model's answer."""
        model = self.answerer.model
        model.set_attn_implementation({"text_config": "sdpa"})
        try:
            (answer,) = generate(self.answerer, [prompt], decoding=decoding)
        finally:
            attend_by_segments(model)
        return answer.text

    def mask_reader(self, encoder: SampleEncoder) -> MaskReader:
        """Return what finds phrases in samples of an encoder, and reads their masks as training did."""
        settings = None if self.readout is None else self.readout.settings
        resolutions = () if settings is None else (settings.resolution, settings.refined_resolution)
        return MaskReader(encoder.tokenizer, encoder.template.turn_end, encoder.settings.merge_size, resolutions)

    def maps(self, sample: EncodedSample, places: Sequence[Place]) -> list[Tensor]:
        """Return the attention of phrases over their pictures: float32 [layers, heads, height, width] each."""
        batch = self._batch(sample)
        probe = AttentionProbe(looks_of(batch, [places]))
        self._run(tell_host(batch) | {"attention_probe": probe, "kept_positions": torch.zeros(0).long()})
        return [maps.unflatten(0, (len(self.layers), -1)).cpu() for maps in probe.maps()]

    def masks(
        self, sample: EncodedSample, places: Sequence[Place], sizes: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Return the masks of phrases, the finest that there are.

        Args:
            sample: from its encoder.
            places: of its phrases.
            sizes: (height, width) in pixels of the mask of each.

        Returns:
            bool of each size.
        """
        assert self.readout is not None, "the folder has not learned masks"
        settings, has_sam = self.readout.settings, self.readout.refiner is not None
        longest = [settings.resolution, *([settings.refined_resolution] if has_sam else ())]
        working = [[working_size(place.grid, one) for one in longest] for place in places]
        batch = self._batch(sample)
        inputs = readout_inputs(batch, [places], working, with_pictures=has_sam)
        prepared = tell_host(batch)
        for name in ("kept_positions", "targets"):
            prepared.pop(name)
        found = split_masks(self._run(prepared | {"readout_inputs": inputs}).logits, working)
        return [mask_pixels(masks[-1], size) for masks, size in zip(found, sizes, strict=True)]

    def _batch(self, sample: EncodedSample) -> dict[str, Any]:
        return for_model(Collator(0, flatten=False)([Item((sample,))]))

    def _run(self, batch: dict[str, Any]) -> Any:
        model = self.answerer.model
        with torch.no_grad():
            return run_model(model, send_to_device(batch, model.device))


def open_grounder(
    folder: str, *, base: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> Grounder:
    """Open a model folder, and what ``--task grounding`` left in it.

    Args:
        folder: model folder or Hugging Face id.
        base: Base model of adapters, where it is not where their folder says.
        device: such as ``cpu`` or ``cuda:1``; None for the accelerator where there is one.
        dtype: of the model's weights; None for the one they are saved in.

    Raises:
        UserError: the folder cannot be opened.
    """
    answerer = open_answerer(folder, base=base, device=device, dtype=dtype)
    model: Any = answerer.model
    readout = None
    if task_files.is_task_folder(folder) and task_files.read_record(folder).get("task") == "grounding":
        readout = GroundingReadout.from_record(model.config, task_files.read_record(folder))
        task_files.load(readout, folder)
        readout.eval()
    install(model, Patchify.from_processor(answerer.processor), readout=readout)
    attend_by_segments(model)
    return Grounder(answerer, readout)


def looks_of(batch: Mapping[str, Any], places: Places) -> list[Look]:
    """Return the places of a batch's samples as its rows have them.

    Args:
        batch: of the collator, on the host.
        places: of each of its samples.
    """
    borders = batch.get("cu_seq_lens_q")
    looks = []
    for number, of_sample in enumerate(places):
        row, start = (number, 0) if borders is None else (0, int(borders[number]))
        for place in of_sample:
            tokens = tuple(start + token for token in place.tokens)
            looks.append(Look(row, tokens, start + place.image_start, place.grid))
    return looks


def readout_inputs(
    batch: Mapping[str, Any], places: Places, sizes: Sequence[Sequence[Size]], *, with_pictures: bool
) -> dict[str, Any]:
    """Return what :class:`qwenvl.tasks.grounding.module.GroundingReadout` has to know of a batch.

    Args:
        batch: of the collator, on the host.
        places: of each of its samples.
        sizes: of the masks of each place, in the same order: (height, width) of the coarse one and of SAM's.
        with_pictures: for SAM.
    """
    inputs: dict[str, Any] = {"looks": looks_of(batch, places), "sizes": sizes}
    if with_pictures:
        starts = accumulate((of_sample[0].of_media for of_sample in places), initial=0)
        picture_of = [
            start + place.medium for start, of_sample in zip(starts, places, strict=False) for place in of_sample
        ]
        used = sorted(set(picture_of))
        inputs["pictures"] = [_picture(batch, number) for number in used]
        inputs["picture_of"] = [used.index(number) for number in picture_of]
    return inputs


def _picture(batch: Mapping[str, Any], number: int) -> Tensor:
    """Return one picture of a batch as the model sees it: uint8 [height, width, 3]."""
    cells = [frames * height * width for frames, _, height, width in batch["media"]]
    values = batch["pixels"].numel() // sum(cells)  # of a patch of one frame
    side = math.isqrt(values // 3)
    start = values * sum(cells[:number])
    _, _, height, width = batch["media"][number]
    picture: Tensor = batch["pixels"][start : start + values * cells[number]]
    return picture.view(height * side, width * side, 3)


def split_masks(output: Tensor, sizes: Sequence[Sequence[Size]]) -> list[list[Tensor]]:
    """Return the masks of each phrase, the coarse one first.

    Args:
        output: [cells], the logits of all coarse masks, then of all finer ones.
        sizes: of each phrase the (height, width) of each of its masks.
    """
    kinds = len(sizes[0]) if sizes else 0
    shapes = [of_phrase[kind] for kind in range(kinds) for of_phrase in sizes]
    parts = output.split([math.prod(shape) for shape in shapes]) if shapes else ()
    masks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [masks[number :: len(sizes)] for number in range(len(sizes))]


def mask_pixels(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return a mask in pixels of a picture, bool [height, width]: more likely in it than not, between cells linearly.

    Args:
        logits: [h, w], over the whole picture.
        size: (height, width) of the picture.
    """
    chances = functional.interpolate(logits.float().sigmoid()[None, None], size=size, mode="bilinear")
    found: np.ndarray = (chances[0, 0] > 0.5).cpu().numpy()
    return found
