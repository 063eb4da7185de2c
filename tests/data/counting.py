"""Datasets for the tests of counting: rows in memory, real media files, and what training gets of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from transformers import AutoConfig, AutoProcessor

from qwenvl.config import DataArguments
from qwenvl.data.dataset import ConversationDataset, SampledTable
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder
from qwenvl.data.sample_stats import REMARKS
from qwenvl.data.sources.table import AnnotationTable
from qwenvl.data.types import DatasetSpec
from qwenvl.families import get_family
from qwenvl.utils.cache import fingerprint
from tests.data.encoding.test_encoder import write_video
from tests.data.images import picture

SMALL = {
    "min_pixels": 32 * 32,
    "max_pixels": 96 * 96,
    "video_min_pixels": 4 * 32 * 32,
    "video_max_pixels": 8 * 64 * 64,
}


class Listed:
    """Rows that stand in a list instead of a file."""

    path = "rows.jsonl"

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = list(records)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def line(self, row: int) -> int:
        return row + 1

    def record(self, row: int) -> Any:
        return self.records[row]


def table_of(
    records: Sequence[Any],
    folder: Path,
    rows: Sequence[int] | None = None,
    name: str = "d",
    percent: float = 100,
    **options: Any,
) -> SampledTable:
    """Return a dataset of ``records``, of which ``rows`` are used: all, unless given."""
    spec = DatasetSpec(name, (Listed.path,), str(folder), percent, options=options)
    used = np.arange(len(records)) if rows is None else np.array(rows)
    return SampledTable(AnnotationTable(spec, (Listed(records),)), used)


def encoder_of(checkpoint: Path, max_length: int = 4096, **flags: Any) -> SampleEncoder:
    config = AutoConfig.from_pretrained(checkpoint)
    arguments = DataArguments(**{**SMALL, **flags})
    family = get_family(config.model_type)
    return build_encoder(AutoProcessor.from_pretrained(checkpoint), config, family, arguments, max_length)


def write_media(folder: Path) -> Path:
    """Write pictures of several kinds and sizes, one of them turned by its EXIF data, and two videos."""
    folder.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    picture(150, 70).save(folder / "turned.jpg", exif=turned)
    picture(200, 130).save(folder / "plain.jpg")
    picture(64, 96).save(folder / "small.png")
    picture(33, 300).save(folder / "narrow.webp")
    write_video(folder / "slow.mp4", frames=5, fps=1)
    write_video(folder / "fast.mp4", frames=40, fps=10)
    return folder


def talk(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def counted_when_decoded(item: Item) -> tuple[int, ...]:
    """Count what training gets, in the order of MEASURES."""
    lengths = [len(sample.tokens) for sample in item.samples]
    trained = [int((sample.tokens.labels != -100).sum()) for sample in item.samples]
    grids = [medium.grid for sample in item.samples for medium in sample.media]
    patches = sum(t * h * w for t, h, w in grids)
    squares = sum(length * length for length in lengths), sum(t * (h * w) ** 2 for t, h, w in grids)
    remarks = Counter(event.kind for event in item.events)
    samples, answers = len({sample.origin for sample in item.samples}), [len(one.tokens.starts) for one in item.samples]
    thoughts = 0  # which only the rendering shows
    all_tokens = [sample.tokens for sample in item.samples]
    weights = [one.weights[list(one.starts)] for one in all_tokens if one.weights is not None]
    weighted = sum(int((of_answers != 1).sum()) for of_answers in weights)
    counts = (samples, sum(lengths), sum(trained), patches, *squares, len(lengths), sum(answers), thoughts, weighted)
    return (*counts, *(remarks[kind] for kind in REMARKS))


def left_out_when_decoded(dataset: ConversationDataset) -> list[str]:
    """Return the messages of what training leaves out, in the order of the rows."""
    events = [event for index in range(len(dataset)) for event in dataset[index].events]
    return [event.message for event in events if event.kind in ("bad", "overlength")]
