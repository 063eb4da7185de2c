"""What differs between the inputs of training and of serving, where, by how much, and why where that is known.

A difference is known only where a fact of the sample or the inputs proves its reason; versions prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.media.resize import ImagePlan, VideoPlan
from qwenvl.data.types import ImageItem, Sample, VideoItem
from qwenvl.serving.inputs import ImageFacts, ModelInputs, Serving, image_facts

State = Literal["equal", "known", "different", "not compared"]
Way = Literal["apply_chat_template", "qwen-vl-utils"]

OUTER_MARKERS = (
    "the processor leaves the template's <|vision_start|> and <|vision_end|> standing around those of a video's "
    "frames; training has one pair a frame, as the official recipe"
)
"""Why Qwen3-VL's prompts with videos have two tokens more: transformers does so from 5.10 on."""

_BEHIND_CLIPS = (
    "this transformers (from 5.3 on) lets text go on behind the height and width of a clip; training lets it go on "
    "behind its last second too, as vLLM, transformers 4 and the official recipe"
)
_CLIPPED = (
    "Pillow clips values of 16 bits at 255, which makes an image white; training scales them, so serve a copy of 8 bits"
)
_RESIZED_BY_PIL = (
    "qwen-vl-utils resizes images by PIL, which rounds and clips between its two passes; training as the processor "
    "does, by torchvision. PIL makes exactly these pixels of training's images"
)
_TIMESTAMP = re.compile(r"<\d+\.\d seconds>")
_CONTEXT = 3  # tokens shown after the first one that differs


@dataclass(frozen=True)
class Finding:
    """One kind of input, compared.

    Args:
        item: Name of the compared input.
        state: ``known``: different, for a reason that ``detail`` gives; ``not compared``: for a reason of this machine.
        detail: Place and size of the difference, or size of what is equal, for people.
    """

    item: str
    state: State
    detail: str


@dataclass(frozen=True)
class Comparison:
    """The inputs of one sample in training and through one way of serving.

    Args:
        serving: the folder.
        plan: Plan of the sample.
        training: Inputs that training feeds the model.
        served: Inputs that serving feeds the model.
        way: Name of the way of serving.
        causes: Known causes of differences of images and of videos, where a fact of the sample explains them.
    """

    serving: Serving
    plan: Plan
    training: ModelInputs
    served: ModelInputs
    way: Way
    causes: Mapping[str, str]

    def findings(self) -> list[Finding]:
        """Compare everything that the sample has."""
        found = [self.ids()]
        found.append(self.positions(found[0]))
        for kind in ("image", "video"):
            if not self.training.grids[kind] and not self.served.grids[kind]:
                continue
            if kind == "video":
                found.append(self.frames())
            grids = self.grids(kind)
            found += [grids, self.pixels(kind, grids)]
        return found

    def ids(self) -> Finding:
        """Compare token ids; the first that differ are shown as text."""
        ours, theirs = self.training.input_ids, self.served.input_ids
        if torch.equal(ours, theirs):
            return Finding("input ids", "equal", f"{len(ours)} tokens")
        detail = self._first_difference(ours, theirs)
        inner = without_outer_markers(theirs, self.serving.processor)
        if torch.equal(ours, inner):
            return Finding("input ids", "known", f"{len(theirs) - len(ours)} more tokens: {OUTER_MARKERS}")
        if self.causes and self._words(ours) == self._words(theirs):
            return Finding("input ids", "known", f"{detail}, in the tokens of media: see there")
        return Finding("input ids", "different", detail)

    def positions(self, ids: Finding) -> Finding:
        """Compare M-RoPE positions, where the tokens are the same."""
        if ids.state != "equal":
            return Finding("positions", ids.state, "other tokens, so other positions")
        ours, theirs = self.training.positions, self.served.positions
        if torch.equal(ours, theirs):
            return Finding("positions", "equal", f"up to {int(ours.max())}")
        grids = [self.grids(kind) for kind in ("image", "video")]
        if any(one.state != "equal" for one in grids):
            state: State = "different" if any(one.state == "different" for one in grids) else "known"
            return Finding("positions", state, "other grids, so other positions")
        if self.causes.get("video") and self.frames().state == "known":
            return Finding("positions", "known", "other times of frames, so other positions")
        if self._is_shift_behind_clips(ours - theirs):
            return Finding("positions", "known", f"up to {int(ours.max())}, here {int(theirs.max())}: {_BEHIND_CLIPS}")
        place = int((ours != theirs).any(dim=0).nonzero()[0])
        detail = f"first at token {place}: {ours[:, place].tolist()} in training, {theirs[:, place].tolist()} here"
        return Finding("positions", "different", detail)

    def _is_shift_behind_clips(self, shift: Tensor) -> bool:
        """Return whether int64 [3, T] is the same on all axes, and changes, upwards, directly behind videos alone."""
        if self.serving.encoder.settings.family.video_layout != "clip":
            return False
        video = self.training.input_ids == self.serving.config.video_token_id
        behind = torch.cat([video.new_zeros(1), video[:-1] & ~video[1:]])
        steps = torch.diff(shift[0], prepend=shift.new_zeros(1))
        return bool((shift == shift[0]).all() and (steps >= 0).all() and not steps[~behind].any())

    def grids(self, kind: str) -> Finding:
        """Compare sizes in patches."""
        ours, theirs = self.training.grids[kind], self.served.grids[kind]
        if ours == theirs:
            return Finding(f"{kind} grids", "equal", _shortened(ours))
        return self._caused(f"{kind} grids", kind, f"{_shortened(ours)} in training, {_shortened(theirs)} here")

    def frames(self) -> Finding:
        """Compare which frames of videos are taken, and the seconds they stand for."""
        ours, theirs = self.training, self.served
        if ours.frames == theirs.frames:
            pairs = zip(ours.seconds, theirs.seconds, strict=True)
            apart = max((float(np.abs(np.subtract(one, other)).max()) for one, other in pairs), default=0.0)
            if apart < 1e-6:  # seconds: rates come as floats of different widths
                return Finding("video frames", "equal", _shortened([list(frames) for frames in ours.frames]))
            return self._caused("video frames", "video", f"their times differ by up to {apart:.3f} s")
        place = next(n for n, pair in enumerate(zip(ours.frames, theirs.frames, strict=True)) if pair[0] != pair[1])
        detail = f"{list(ours.frames[place])} in training, {list(theirs.frames[place])} here"
        return self._caused("video frames", "video", detail)

    def pixels(self, kind: str, grids: Finding) -> Finding:
        """Compare normalised pixels, in units of 8-bit values."""
        item, ours, theirs = f"{kind} pixels", self.training.patches[kind], self.served.patches[kind]
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return Finding(item, grids.state, "other sizes, so other pixels")
        if torch.equal(ours, theirs):
            return Finding(item, "equal", f"{ours.numel()} values, bit for bit")
        levels = self._levels(ours, theirs)
        share = float((ours != theirs).float().mean())
        detail = f"{share:.1%} of the values, by {levels:.1f} of 255 levels at most"
        return self._caused(item, kind, detail)

    def _caused(self, item: str, kind: str, detail: str) -> Finding:
        reason = self.causes.get(kind)
        return Finding(item, "known", f"{detail}: {reason}") if reason else Finding(item, "different", detail)

    def _levels(self, ours: Tensor, theirs: Tensor) -> float:
        spread = self.serving.patchify.std.flatten()[:, None]
        differences = (ours - theirs).abs().view(len(ours), len(spread), -1)
        return float((differences * spread).max())

    def _first_difference(self, ours: Tensor, theirs: Tensor) -> str:
        length = min(len(ours), len(theirs))
        unequal = (ours[:length] != theirs[:length]).nonzero()
        place = int(unequal[0]) if len(unequal) else length
        texts = [self.serving.processor.tokenizer.decode(ids[place : place + _CONTEXT]) for ids in (ours, theirs)]
        return f"{len(ours)} and {len(theirs)} tokens, first at {place}: {texts[0]!r} in training, {texts[1]!r} here"

    def _words(self, ids: Tensor) -> str:
        """Return the text without media tokens and timestamps."""
        special = torch.tensor(list(_vision_ids(self.serving.processor).values()))
        return _TIMESTAMP.sub("", self.serving.processor.tokenizer.decode(ids[~torch.isin(ids, special)]))


def causes_of(way: Way, serving: Serving, plan: Plan, sample: Sample, served: ModelInputs) -> dict[str, str]:
    """Return what explains differences of a sample's images and videos, by kind: facts of the sample and its media."""
    items = plan.conversation.media()
    facts = [image_facts(serving, sample, item) for item in items if isinstance(item, ImageItem)]
    videos = [medium for medium in plan.media if isinstance(medium, VideoPlan)]
    of_images, of_videos = (
        ([_transformers_reads(fact) for fact in facts], [])
        if way == "apply_chat_template"
        else ([_utils_reads(fact) for fact in facts], _utils_samples(videos, served))
    )
    if any(video.times is not None for video in videos):
        of_videos.append(
            f"the frames have no constant rate: training writes their real times, {way} their numbers over the mean "
            "rate; give both a copy of constant rate (ffmpeg -fps_mode cfr)"
        )
    if way == "qwen-vl-utils" and _is_resized_by_pil(serving, plan, sample, served.patches["image"]):
        of_images.append(_RESIZED_BY_PIL)
    if way == "apply_chat_template":
        of_images += _told_settings(items, ImageItem)
        of_videos += _told_settings(items, VideoItem)
    found = {"image": of_images, "video": of_videos}
    return {kind: "; ".join(dict.fromkeys(filter(None, causes))) for kind, causes in found.items() if any(causes)}


def _is_resized_by_pil(serving: Serving, plan: Plan, sample: Sample, served: Tensor | None) -> bool:
    """Return whether patches are those of training's images, all resized by PIL as planned, bit for bit."""
    images = [medium for medium in plan.media if isinstance(medium, ImagePlan)]
    if served is None or not any(image.resized != image.size for image in images):
        return False
    reader, shapes, pixels = serving.encoder.reader(sample), [], []
    for image in images:
        height, width = image.resized
        resized = reader.read_image(image.item).resize((width, height), Image.Resampling.BICUBIC)
        pixels.append(torch.from_numpy(np.array(resized)).flatten())
        shapes.append((1, *image.grid))
    return torch.equal(serving.patchify(torch.cat(pixels), shapes), served)


def _transformers_reads(image: ImageFacts) -> str:
    if image.transparent and image.from_file:
        return (
            "transformers drops the transparency of an image file, and shows the colours beneath, where training has "
            "white; serve it opened by Pillow, or train and serve a copy without transparency"
        )
    if image.sixteen_bits and image.from_file and not image.mode.startswith("I;16"):
        return "transformers rounds colours of 16 bits, and Pillow, which training reads them with, cuts them"
    return _CLIPPED if image.mode.startswith("I;16") and not image.from_file else ""


def _utils_reads(image: ImageFacts) -> str:
    if image.turned:
        return "qwen-vl-utils does not turn images as their EXIF orientation says"
    if image.transparent and image.mode != "RGBA":
        return f"of transparent images, qwen-vl-utils lays those of mode RGBA alone on white, and this has {image.mode}"
    return _CLIPPED if image.mode.startswith("I;16") else ""


def _utils_samples(videos: Sequence[VideoPlan], served: ModelInputs) -> list[str]:
    if any(isinstance(video.item.source, tuple) for video in videos):
        return ["qwen-vl-utils resizes the frames of a list one by one, by a rule of its own"]
    if served.frames and all(_is_spread(frames) for frames in served.frames):
        return [
            "qwen-vl-utils takes an even number of frames, spread from the first to the last; training takes them as "
            "the model's own processor does"
        ]
    return []


def _told_settings(items: Sequence[ImageItem | VideoItem], kind: type) -> list[str]:
    named = sorted({name for item in items if isinstance(item, kind) for name in own_settings(item)})
    return [f"the sample has {', '.join(named)} of its own, which apply_chat_template does not read"] if named else []


def own_settings(item: ImageItem | VideoItem) -> list[str]:
    """Return the names of settings that a record gives a medium itself."""
    names = ["min_pixels", "max_pixels"]
    if isinstance(item, VideoItem):
        names += ["total_pixels", "nframes", "min_frames", "max_frames", "video_start", "video_end"]
        names += [] if isinstance(item.source, tuple) else ["fps"]  # of a list of frames: the rate they were taken at
    return [name for name in names if getattr(item, name) is not None]


def _is_spread(frames: tuple[int, ...]) -> bool:
    spread = np.linspace(frames[0], frames[-1], len(frames)).round().astype(int).tolist()
    return len(frames) % 2 == 0 and list(frames) == spread


def _vision_ids(processor: Any) -> dict[str, int]:
    names = ("<|vision_start|>", "<|vision_end|>", processor.image_token, processor.video_token)
    return {name: processor.tokenizer.convert_tokens_to_ids(name) for name in names}


def without_outer_markers(ids: Tensor, processor: Any) -> Tensor:
    """Leave out each start marker that no media token follows, and each end marker that follows none."""
    start, end, *media = _vision_ids(processor).values()
    is_medium = torch.isin(ids, torch.tensor(media))
    starts = (ids == start) & ~is_medium.roll(-1)
    ends = (ids == end) & ~is_medium.roll(1)
    return ids[~(starts | ends)]


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
