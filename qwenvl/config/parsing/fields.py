"""Describe the fields of the argument classes, and convert values that users write to their types."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qwenvl.config.parsing.expressions import evaluate
from qwenvl.utils.errors import UserError, nearest


@dataclass(frozen=True)
class Setting:
    """One field of an argument class.

    Args:
        name: Name of the field, which is the flag without dashes and the key in a recipe.
        owner: Class of the field.
        kinds: Accepted types among bool, int, float, str, list and dict.
        choices: Accepted texts; empty where any text is accepted.
        default: Default value; for mutable ones, a fresh copy.
        help: One or two sentences for users.
        bare: Value of the flag when nothing follows it; None where a value is needed.
        joined_by: Separator that joins the items of a list to the text of the field; empty where lists are refused.
    """

    name: str
    owner: type
    kinds: frozenset[type]
    choices: tuple[str, ...]
    default: Any
    help: str
    bare: Any = None
    joined_by: str = ""

    @property
    def expected(self) -> str:
        """Accepted values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {
            bool: "true or false",
            int: "a whole number (576*32*32 is one too)",
            float: "a number",
            list: "a list",
            dict: "a mapping (as JSON on the command line)",
            str: "text",
        }
        return " or ".join(word for kind, word in words.items() if kind in self.kinds)


def settings_of(*classes: type) -> dict[str, Setting]:
    """Return the settings of argument classes by name, in the order of their fields."""
    settings: dict[str, Setting] = {}
    for owner in classes:
        hints = get_type_hints(owner)
        for field in dataclasses.fields(owner):
            kinds, choices = _kinds_and_choices(hints[field.name])
            if field.init and kinds:  # a field without a plain type can only be set from Python
                settings[field.name] = _setting(owner, field, kinds, choices)
    return settings


def _setting(owner: type, field: dataclasses.Field[Any], kinds: frozenset[type], choices: tuple[str, ...]) -> Setting:
    factory = field.default_factory
    return Setting(
        name=field.name,
        owner=owner,
        kinds=kinds,
        choices=tuple(field.metadata.get("choices", choices)),
        default=field.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory(),
        help=field.metadata.get("help", ""),
        bare=True if kinds == {bool} else field.metadata.get("const"),
        joined_by=field.metadata.get("joined_by", ""),
    )


def _kinds_and_choices(hint: Any) -> tuple[frozenset[type], tuple[str, ...]]:
    """Return the plain types a type hint allows, and its choices where an enumeration or Literal lists them."""
    kinds: set[type] = set()
    choices: list[str] = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            choices += [value for value in get_args(member) if isinstance(value, str)]
            kinds |= {type(value) for value in get_args(member)}
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            choices += [str(value.value) for value in member]
        elif (plain := get_origin(member) or member) in (bool, int, float, str, list, dict):
            kinds.add(plain)
    return frozenset(kinds), tuple(choices)


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _members(member)
    elif hint is not type(None):
        yield hint


def convert(setting: Setting, value: Any) -> Any:
    """Convert a value from a recipe or command line to a type that the field takes.

    Args:
        setting: Field that takes the value.
        value: Text from the command line (a list of texts where lists are accepted), or a value from YAML or JSON.

    Raises:
        UserError: the value fits none of the field's types. The message has the expected types, but not the place.
    """
    if setting.choices:
        return _choice(setting, value)
    if isinstance(value, list) and len(value) == 1 and str in setting.kinds:
        value = value[0]
    if setting.bare is True and bool not in setting.kinds and isinstance(_as_bool(value), bool):
        return True if _as_bool(value) else None  # transformers: --fsdp alone means True, although its type is text
    for kind, attempt in _ATTEMPTS.items():
        if kind in setting.kinds and (result := attempt(value)) is not None:
            return float(result) if isinstance(result, int) and isinstance(setting.default, float) else result
    if setting.joined_by and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return setting.joined_by.join(value)
    raise UserError(f"{_shown(value)} does not fit: expected {setting.expected}.")


def _choice(setting: Setting, value: Any) -> str:
    text = {False: "no", True: "yes"}[value] if isinstance(value, bool) else str(value)  # YAML reads no as false
    if text not in setting.choices:
        raise UserError(f"{_shown(value)} does not fit: expected {setting.expected}.{nearest(text, setting.choices)}")
    return text


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return words.get(str(value).lower()) if isinstance(value, str | int) else None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return evaluate(str(value))  # text too: YAML 1.1 reads 1e-5, without a dot, as text
    except ValueError:
        return None


def _as_int(value: Any) -> int | None:
    number = _as_float(value)
    return int(number) if number is not None and number == int(number) else None


def _as_dict(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{_shown(value)} is not valid JSON: {error}.") from error
    return dict(value) if isinstance(value, Mapping) else None


def _as_list(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, list) else None


def _as_str(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


_ATTEMPTS = {bool: _as_bool, int: _as_int, float: _as_float, dict: _as_dict, list: _as_list, str: _as_str}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
