"""Open a model folder to get the masks and attention maps of samples, and build the inputs of the grounding module."""

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
from qwenvl.inference.generate import ChatModel, Decoding, generate, open_chat_model
from qwenvl.inference.prompts import Prompt
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.attention.probe import AttentionProbe, Look
from qwenvl.models.forward import install
from qwenvl.models.loss.causal_lm import prepare_inputs, run_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks import files as task_files
from qwenvl.tasks.grounding.module import GroundingReadout, mapped_layers
from qwenvl.tasks.grounding.phrases import MaskReader, Place, working_size

Size = tuple[int, ...]
Places = Sequence[Sequence[Place]]


USAGE = """from qwenvl.tasks.grounding.predict import open_grounder  # from this trainer

# Without masks, the model opens with AutoModelForImageTextToText as usual, and answers as before.
# tools/show_attention.py draws the attention of phrases, and their masks.

grounder = open_grounder("{name}")"""
"""Lines of a model card."""


@dataclass(frozen=True)
class Grounder:
    """An open model for the attention maps of phrases, and for masks if it was trained with ``--task grounding``.

    Args:
        chat_model: Model and processor.
        readout: Module that ``--task grounding`` trained; None for a folder without it.
    """

    chat_model: ChatModel
    readout: GroundingReadout | None

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that have attention maps: the layers of full attention."""
        return mapped_layers(self.chat_model.model.config)

    def ask(self, prompt: Prompt, decoding: Decoding) -> str:
        """Return the model's answer."""
        model = self.chat_model.model
        model.set_attn_implementation({"text_config": "sdpa"})
        try:
            (answer,) = generate(self.chat_model, [prompt], decoding=decoding)
        finally:
            attend_by_segments(model)
        return answer.text

    def mask_reader(self, encoder: SampleEncoder) -> MaskReader:
        """Return a reader that finds phrases in samples of an encoder, and reads their masks as in training."""
        settings = None if self.readout is None else self.readout.settings
        resolutions = () if settings is None else (settings.resolution, settings.refined_resolution)
        return MaskReader(encoder.tokenizer, encoder.template.turn_end, encoder.settings.merge_size, resolutions)

    def maps(self, sample: EncodedSample, places: Sequence[Place]) -> list[Tensor]:
        """Return the attention of phrases to their images: float32 [layers, heads, height, width] each."""
        batch = self._batch(sample)
        probe = AttentionProbe(looks_of(batch, [places]))
        self._run(prepare_inputs(batch) | {"attention_probe": probe, "kept_positions": torch.zeros(0).long()})
        return [maps.unflatten(0, (len(self.layers), -1)).cpu() for maps in probe.maps()]

    def masks(
        self, sample: EncodedSample, places: Sequence[Place], sizes: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Return the finest masks of phrases.

        Args:
            sample: Encoded sample.
            places: Positions of its phrases.
            sizes: (height, width) of each mask in pixels.

        Returns:
            One mask for each phrase, bool [height, width].
        """
        assert self.readout is not None, "the folder has not learned masks"
        settings, has_sam = self.readout.settings, self.readout.refiner is not None
        longest = [settings.resolution, *([settings.refined_resolution] if has_sam else ())]
        working = [[working_size(place.grid, one) for one in longest] for place in places]
        batch = self._batch(sample)
        inputs = readout_inputs(batch, [places], working, with_images=has_sam)
        prepared = prepare_inputs(batch)
        for name in ("kept_positions", "targets"):
            prepared.pop(name)
        found = split_masks(self._run(prepared | {"readout_inputs": inputs}).logits, working)
        return [mask_pixels(masks[-1], size) for masks, size in zip(found, sizes, strict=True)]

    def _batch(self, sample: EncodedSample) -> dict[str, Any]:
        return for_model(Collator(0, flatten=False)([Item((sample,))]))

    def _run(self, batch: dict[str, Any]) -> Any:
        model = self.chat_model.model
        with torch.no_grad():
            return run_model(model, send_to_device(batch, model.device))


def open_grounder(
    folder: str, *, base: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> Grounder:
    """Open a model folder, with the grounding module if it holds one.

    Args:
        folder: Model folder, adapter folder, or a Hugging Face id.
        base: Base model of the adapters, if it is not at the location in ``adapter_config.json``.
        device: Device such as ``cpu`` or ``cuda:1``; None for the accelerator if there is one.
        dtype: Dtype of the model's weights; None for the dtype that they are saved in.

    Raises:
        UserError: the folder cannot be opened.
    """
    chat_model = open_chat_model(folder, base=base, device=device, dtype=dtype)
    model: Any = chat_model.model
    readout = None
    if task_files.is_task_folder(folder) and task_files.read_record(folder).get("task") == "grounding":
        readout = GroundingReadout.from_record(model.config, task_files.read_record(folder))
        task_files.load(readout, folder)
        readout.eval()
    install(model, Patchify.from_processor(chat_model.processor), readout=readout)
    attend_by_segments(model)
    return Grounder(chat_model, readout)


def looks_of(batch: Mapping[str, Any], places: Places) -> list[Look]:
    """Return the positions of phrases and images in the rows of a batch.

    Args:
        batch: Batch of the collator, on the host.
        places: Positions in each of its samples.
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
    batch: Mapping[str, Any], places: Places, sizes: Sequence[Sequence[Size]], *, with_images: bool
) -> dict[str, Any]:
    """Return the inputs of :class:`qwenvl.tasks.grounding.module.GroundingReadout` for a batch.

    Args:
        batch: Batch of the collator, on the host.
        places: Positions in each of its samples.
        sizes: (height, width) of the coarse mask, and of SAM's mask, for each place in order.
        with_images: Whether to add the images, for SAM.
    """
    inputs: dict[str, Any] = {"looks": looks_of(batch, places), "sizes": sizes}
    if with_images:
        starts = accumulate((of_sample[0].of_media for of_sample in places), initial=0)
        image_of = [
            start + place.medium for start, of_sample in zip(starts, places, strict=False) for place in of_sample
        ]
        used = sorted(set(image_of))
        inputs["images"] = [_image(batch, number) for number in used]
        inputs["image_of"] = [used.index(number) for number in image_of]
    return inputs


def _image(batch: Mapping[str, Any], number: int) -> Tensor:
    """Return one image of a batch, resized for the model: uint8 [height, width, 3]."""
    cells = [frames * height * width for frames, _, height, width in batch["media"]]
    values = batch["pixels"].numel() // sum(cells)  # values per patch of one frame
    side = math.isqrt(values // 3)
    start = values * sum(cells[:number])
    _, _, height, width = batch["media"][number]
    image: Tensor = batch["pixels"][start : start + values * cells[number]]
    return image.view(height * side, width * side, 3)


def split_masks(output: Tensor, sizes: Sequence[Sequence[Size]]) -> list[list[Tensor]]:
    """Return the masks of each phrase, coarse mask first.

    Args:
        output: [cells], the logits of all coarse masks, then of all fine masks.
        sizes: (height, width) of each mask of each phrase.
    """
    kinds = len(sizes[0]) if sizes else 0
    shapes = [of_phrase[kind] for kind in range(kinds) for of_phrase in sizes]
    parts = output.split([math.prod(shape) for shape in shapes]) if shapes else ()
    masks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [masks[number :: len(sizes)] for number in range(len(sizes))]


def mask_pixels(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return a mask in pixels of an image, bool [height, width]: interpolated probabilities above 0.5.

    Args:
        logits: [h, w], over the whole image.
        size: (height, width) of the image in pixels.
    """
    chances = functional.interpolate(logits.float().sigmoid()[None, None], size=size, mode="bilinear")
    found: np.ndarray = (chances[0, 0] > 0.5).cpu().numpy()
    return found
