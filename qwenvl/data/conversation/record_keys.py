"""Check the keys of a record: refuse keys that are not supported, and report keys that nothing reads.

Each key is read (by the readers of turns, of media, of tasks, ...), known to mean nothing here, refused, or reported
once per dataset. Null counts as absent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qwenvl.data.conversation.media_items import MEDIA_FIELDS, media_keys
from qwenvl.data.conversation.turns import AUDIO_FIELDS, unread_keys_of_turns
from qwenvl.data.sources.record_forms import TURN_FIELDS
from qwenvl.data.types import SAMPLE_OPTIONS
from qwenvl.utils.errors import SampleError

_READ = frozenset(
    (
        *(*TURN_FIELDS, *MEDIA_FIELDS, *AUDIO_FIELDS, "system", "tools"),  # messages
        *("id", "bbox_format", *SAMPLE_OPTIONS),  # annotations, boxes, training
        *("label", "masks", "kto_tag"),  # tasks; the last one is KTO's, see below
        *("answers", "metric"),  # evaluation
    )
)
_MEAN_NOTHING = frozenset(
    (
        *("uid", "uuid", "guid", "idx", "index", "key", "sample_id", "image_id", "video_id", "question_id", "doc_id"),
        *("source", "data_source", "dataset", "dataset_name", "dataset_id", "origin", "origin_dataset", "subset"),
        *("split", "license", "url", "meta", "metadata", "meta_data", "extra_info", "task", "task_type", "type"),
        *("category", "lang", "language", "model", "width", "height", "width_list", "height_list"),
        *("image_width", "image_height", "image_size", "image_sizes", "size", "resolution"),
    )
)
"""Keys for the origin of a sample, and for facts that the file of its image contains too."""
_KNOWN = _READ | _MEAN_NOTHING

_KTO = ("label", "kto_tag")
NO_AUDIO = "The models cannot hear. Take the sample out, or write down what is heard."


def check_keys(record: Mapping[str, Any], turns: Iterable[Any], task_fields: Collection[str]) -> None:
    """Refuse a record with a key that changes what is to be learned but is not supported.

    Args:
        record: Fields of the sample.
        turns: Turns of the sample, as written.
        task_fields: Fields that a task reads.

    Raises:
        SampleError: there is such a key (``bad_record``).
    """
    for number, fields in enumerate((record, *turns)):
        for key in AUDIO_FIELDS if isinstance(fields, Mapping) else ():
            if fields.get(key) not in (None, "", []):
                where = f"turn {number}" if number else "the sample"
                raise SampleError("bad_record", f"{where} has {key!r}. {NO_AUDIO}")
    for key in _KTO:
        if record.get(key) is False and key not in task_fields:
            raise SampleError(
                "bad_record",
                f"the sample has {key!r} false, which in KTO marks a bad answer: it would be trained as a good one. "
                "Take such samples out (preferences are not trained here).",
            )


def unread_keys(record: Mapping[str, Any], turns: Iterable[Any], read: Collection[str]) -> tuple[str, ...]:
    """Return the keys of a record, of its turns and of their parts that nothing reads, for messages, in their order.

    Args:
        record: Fields of the sample.
        turns: Turns of the sample, as written.
        read: Keys of this record that are read, besides those read from every record.
    """
    found = [key for key in record if record[key] is not None and key not in _KNOWN and key not in read]
    if found:
        media = [key for keys in media_keys(record).values() for key in keys]
        found = [key for key in found if key not in media]
    return (*sorted(repr(str(key)[:80]) for key in found), *unread_keys_of_turns(turns))
