"""Restore rows of Arrow tables as their author wrote them: without the nulls that Arrow adds, and maps as objects.

A column of structs has one type for all rows, the union of what they hold: of two calls, ``weather(city)`` and
``time(zone)``, each gets both arguments, the other's as null. A null field of a struct is therefore taken as absent, at
any depth. (To keep a null, write the value as a JSON string, or the file as JSON.) Nulls in lists, in maps and in
columns of type JSON come from the author, and stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


def as_written(row: dict[str, Any], schema: pyarrow.Schema) -> dict[str, Any]:
    """Return a row without the nulls inside its columns; nulls of whole columns stay.

    Args:
        row: Values by column, as from ``to_pylist``.
        schema: Types of the columns.
    """
    types = {field.name: field.type for field in schema}
    return {name: _value(value, types[name]) for name, value in row.items()}


def _value(value: Any, column_type: pyarrow.DataType) -> Any:
    from pyarrow import types

    if value is None or not types.is_nested(column_type):
        return value
    if types.is_struct(column_type):
        known = {name: _value(item, column_type.field(name).type) for name, item in value.items()}
        return {name: item for name, item in known.items() if item is not None}
    if types.is_map(column_type):
        return {key: _value(item, column_type.item_type) for key, item in value}
    if hasattr(column_type, "value_type"):  # any kind of list
        return [_value(item, column_type.value_type) for item in value]
    return value
