"""Check on opening that the columns of a table hold samples, and rename them to the fields of samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from qwenvl.data.sources.record_forms import LISTS_OF_TURNS, TURN_FIELDS, find_forms, missing_turns
from qwenvl.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

_MEDIA = ("image", "images", "video", "videos")
_ANYTHING = ("null", "extension<arrow.json")  # every row null; JSON, where rows are of several types
_OF_MEDIA = ("string", "large_string", "binary", "large_binary", "struct", "dictionary", *_ANYTHING)
_OF_TURNS = ("struct", *_ANYTHING)  # a struct of lists: the ``datasets`` library writes lists of structs so


def to_fields(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a record with the field names of samples, and its turns as a list.

    Args:
        record: Values by column.
        columns: Columns by field, for the fields that have another name.
    """
    fields = _rename(record, columns) if columns else record
    for field in (*TURN_FIELDS, *LISTS_OF_TURNS):
        turns = fields.get(field)
        if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
            # The datasets library can store a list of {"from": ..., "value": ...} as {"from": [...], "value": [...]}.
            rows = itertools.zip_longest(*turns.values())
            fields = {**fields, field: [dict(zip(turns, row, strict=True)) for row in rows]}
    return fields


def _rename(values: Mapping[str, T], columns: Mapping[str, str]) -> dict[str, T]:
    taken = set(columns.values())
    fields = {name: value for name, value in values.items() if name not in taken}
    return {**fields, **{field: values[column] for field, column in columns.items() if column in values}}


def holds_bytes(schema: pyarrow.Schema) -> bool:
    """Return whether a column holds bytes (in annotations: images), alone or inside its lists and structs."""
    return any(_has_bytes(field.type) for field in schema)


def check_columns(schema: pyarrow.Schema, columns: Mapping[str, str]) -> None:
    """Refuse a table that has no turns, whose turns or media are of another type, or lacks a column.

    Args:
        schema: Columns of the table.
        columns: See :func:`to_fields`.

    Raises:
        UserError: the table cannot be used; the message names its columns.
    """
    known = f"Its columns: {', '.join(schema.names) or 'none'}."
    for field, column in columns.items():
        if column not in schema.names:
            hint = nearest(column, schema.names)
            raise UserError(f"has no column {column!r}, which 'columns' gives for {field!r}.{hint} {known}")
    types = _rename({name: schema.field(name).type for name in schema.names}, columns)
    if not any(field in types for field in TURN_FIELDS) and not find_forms(types):
        raise UserError(
            f"has no column 'conversations' or 'messages'. {known} If one of them holds the turns, say so in the "
            f'registry entry: "columns": {{"conversations": NAME}}. {missing_turns(types)}'
        )
    for field in TURN_FIELDS:
        if field in types and not (_is_list(types[field]) or _is_one_of(types[field], _OF_TURNS)):
            raise UserError(_wrong_type(field, types[field], columns, "a list of turns"))
    for field in _MEDIA:
        if field in types and not _is_one_of(_innermost(types[field]), _OF_MEDIA):
            raise UserError(_wrong_type(field, types[field], columns, "paths, images or bytes, or lists of them"))


def _wrong_type(field: str, column_type: pyarrow.DataType, columns: Mapping[str, str], expected: str) -> str:
    column = columns.get(field, field)
    meant = f" ({field!r})" if column != field else ""
    return f"its column {column!r}{meant} is of type {str(column_type)[:80]}; it must hold {expected}."


def _is_one_of(column_type: pyarrow.DataType, names: tuple[str, ...]) -> bool:
    return str(column_type).startswith(names)


def _is_list(column_type: pyarrow.DataType) -> bool:
    return "list" in str(column_type).split("<")[0]


def _innermost(column_type: pyarrow.DataType) -> pyarrow.DataType:
    while _is_list(column_type):
        column_type = column_type.value_type
    return column_type


def _has_bytes(column_type: pyarrow.DataType) -> bool:
    inner = (column_type.field(number).type for number in range(column_type.num_fields))
    return "binary" in str(column_type).split("<")[0].split("[")[0] or any(map(_has_bytes, inner))
