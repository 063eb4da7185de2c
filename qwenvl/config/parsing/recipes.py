"""Read recipes: YAML or JSON files of settings."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from qwenvl.utils.checkout import CHECKOUT
from qwenvl.utils.errors import UserError

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
SUFFIXES = (".yaml", ".yml", ".json")


def find_file(path: str, what: str) -> Path:
    """Find a file of settings: relative to the current folder, or else in the repository (where there is one).

    Args:
        path: Path that the user gave.
        what: Name of the file's kind, for the message.

    Raises:
        UserError: the file is in neither place.
    """
    given = Path(path).expanduser()
    candidates = [given] if CHECKOUT is None else [given, CHECKOUT / given]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
    raise UserError(f"{what} {path!r} is not a file: looked for {looked}. Correct the path.")


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe: one mapping of names to values.

    Args:
        path: Path of a ``.yaml``, ``.yml`` or ``.json`` file, found as by :func:`find_file`.

    Raises:
        UserError: the file is missing, of another kind, has broken syntax or a repeated name, or is not a mapping.
    """
    if not path.lower().endswith(SUFFIXES):
        raise UserError(f"recipe {path!r}: a recipe is a {', '.join(SUFFIXES)} file; flags start with --.")
    file = find_file(path, "recipe")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = _from_json(text) if file.suffix.lower() == ".json" else _from_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bad JSON, UTF-8 or number
        raise UserError(f"recipe {file}: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"recipe {file} cannot be read: {error.strerror}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"recipe {file}: expected lines of 'name: value', found a {type(content).__name__}.")
    return {_key(name, file): value for name, value in content.items()}


def _key(name: Hashable, file: Path) -> str:
    if not isinstance(name, str):
        raise UserError(f"recipe {file}: the name {name!r} is not text.")
    return name


def _from_json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{repeated!r} is given twice; keep one")
        return dict(items)

    return json.loads(text, object_pairs_hook=pairs)


def _from_yaml(text: str) -> Any:
    loader = _RecipeLoader(text)
    try:
        node = loader.get_single_node()
        _read_nested_floats(node, depth=0)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _read_nested_floats(node: yaml.Node | None, depth: int) -> None:
    """Read ``1e-6`` within a mapping or list as a number, as for settings of known type.

    YAML 1.1, which PyYAML reads, requires a dot and a sign of the exponent. Quoted text stays text.
    """
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            _read_nested_floats(value, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _read_nested_floats(value, depth + 1)
    elif isinstance(node, yaml.ScalarNode) and depth > 1 and node.style is None and _FLOAT.fullmatch(node.value):
        node.tag = "tag:yaml.org,2002:float"


class _RecipeLoader(yaml.SafeLoader):
    """YAML without tags that run code, where a name given twice is an error and dates stay text."""

    # A copy: PyYAML's own table stays as it is.
    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            line = max(key.start_mark.line for key, _ in node.value if key.value == repeated) + 1
            raise yaml.YAMLError(f"line {line}: {repeated!r} is given twice; keep one.")
        return super().construct_mapping(node, deep=deep)
