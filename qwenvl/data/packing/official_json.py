"""Write packed annotation files of the official recipe: a JSON array whose rows are lists of samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl.data.conversation.media_items import IMG_TAG, SOURCE_KEYS, img_source, media_keys
from qwenvl.data.conversation.messages import MEDIA_ROLES, speaker_role
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.media.locate import absolute_source
from qwenvl.data.sources.record_forms import TURN_FIELDS, as_messages
from qwenvl.data.types import Sample
from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError


def write_packed_json(path: Path, packs: ConversationDataset) -> str:
    """Write packs as ``tools/pack_data.py`` of the official recipe does: each row is the list of a pack's samples.

    Such a file has a single media folder. Where the datasets have several, full paths are written.

    Args:
        path: File to write, replaced in one step: ``.json`` for an array, ``.jsonl`` for one pack per line.
        packs: Packs to write.

    Returns:
        The ``data_path`` to register it with; empty where paths are written in full.

    Raises:
        UserError: a sample cannot be written as JSON, or the file cannot be written.
    """
    folders = {table.table.spec.data_path for table in packs.tables}
    folder = folders.pop() if len(folders) == 1 else None
    opening, separator, closing = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(opening)
            for index in range(len(packs)):
                rows = [_as_json(sample, in_full=folder is None) for sample in packs.samples(index)]
                file.write(f"{separator if index else ''}[{', '.join(rows)}]")
            file.write(closing)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    return folder or ""


def _as_json(sample: Sample, *, in_full: bool) -> str:
    record = dict(sample.record)
    if in_full:
        record = with_sources(record, partial(absolute_source, data_path=sample.data_path))
    if record.get("bbox_format") is None and sample.bbox_format is not None:
        record["bbox_format"] = sample.bbox_format  # from its dataset's entry; another dataset may have another one
    try:
        return json.dumps(record, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{sample.origin}: the sample cannot be written as JSON ({error}), such as images kept as bytes in "
            "Parquet. Use --format plan, which leaves annotations where they are."
        ) from error


def with_sources(record: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a record with the path or URI of each of its images and videos changed, and its turns as messages.

    Args:
        record: Record in any form; see :mod:`qwenvl.data.conversation.messages`.
        change: Function from a source to the new one.
    """
    changed = _media_with_sources(as_messages(record), change)
    for key in TURN_FIELDS:
        if isinstance(changed.get(key), list):
            changed[key] = [_turn_with_sources(turn, change) for turn in changed[key]]
    return changed


def _media_with_sources(fields: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Change the media fields of a record or of a turn."""
    changed = dict(fields)
    for kind, keys in media_keys(fields).items():
        for key in keys:
            changed[key] = _with_sources(changed[key], kind, change)
    return changed


def _turn_with_sources(turn: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    changed = _media_with_sources(turn, change)
    for key in ("value", "content"):
        if isinstance(changed.get(key), list):
            changed[key] = [_part_with_sources(part, change) for part in changed[key]]
        elif isinstance(changed.get(key), str) and speaker_role(turn) in MEDIA_ROLES:
            changed[key] = re.sub(IMG_TAG, lambda tag: f"<img>{change(img_source(tag[0]))}</img>", changed[key])
    return changed


def _part_with_sources(part: Any, change: Callable[[str], str]) -> Any:
    name = str(part.get("type")) if isinstance(part, Mapping) else ""
    kind = next((kind for kind in SOURCE_KEYS if name.startswith(kind)), None)
    return part if kind is None else _with_sources(part, kind, change)


def _with_sources(value: Any, kind: Any, change: Callable[[str], str]) -> Any:
    """Change a source, a list of them, or an object that holds them."""
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, list):
        return [_with_sources(one, kind, change) for one in value]
    if isinstance(value, Mapping):
        keys = SOURCE_KEYS[kind]
        return {key: _with_sources(one, kind, change) if key in keys else one for key, one in value.items()}
    return value
