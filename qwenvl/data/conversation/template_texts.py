"""Whether a chat template writes texts as they are, whatever they say: proven once, instead of rendering every sample.

A template is a program, which may look into a text (for ``<think>``, say) and write something else. It is run on texts
that note whatever is done with them: all it may do is to write them, to put others before or behind, and to ask whether
there are any. Parts of the language that would leave a plain copy of a text, whose uses nobody notes, or look at one
from the side, are not accepted. What is not proven is rendered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# In place of a text. Quotes and backslashes, so that one that is written as JSON is not found again.
HOLE = '\ue000"\\\ue000'

_ACCEPTED = (
    nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.NSRef, nodes.Name, nodes.Const,
    nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Operand, nodes.Test, nodes.And, nodes.Or, nodes.Not, nodes.Add,
    nodes.Sub, nodes.CondExpr, nodes.Call, nodes.Keyword, nodes.Filter, nodes.Macro, nodes.Break, nodes.Continue,
)  # fmt: skip
_CALLS = ("namespace", "raise_exception")
_TESTS = ("string", "defined", "undefined", "none", "mapping", "true", "false", "boolean", "number", "integer")
_LOOKS = (
    "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__len__", "__iter__",
    "__getitem__", "__mod__", "__rmod__", "__mul__", "__rmul__", "__format__", "__repr__",
)  # fmt: skip


def writes_texts_as_they_are(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], expected: str
) -> bool:
    """Return whether a template writes messages of this form around any texts as it does around :data:`HOLE`.

    Texts that are empty are another form.

    Args:
        template: its source.
        messages: as templates take them; each text is :data:`HOLE`.
        variables: all else that the template is given.
        expected: what transformers makes of these messages.
    """
    program = _open(template)
    if program is None:
        return False
    looks: list[str] = []
    try:
        written = program.render(messages=_watch(list(messages), _watched_text(looks)), **variables)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return written == expected and not looks


@functools.lru_cache(maxsize=8)
def _open(template: str) -> Template | None:
    """Compile a template with transformers' own settings; None where some use of a text would not be noted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        tree = environment.parse(template)
    except TemplateError:
        return None
    written, macros = _written(tree), {macro.name for macro in tree.find_all(nodes.Macro)}
    notes_all = all(_is_accepted(node, id(node) in written, macros) for node in tree.find_all(nodes.Node))
    return environment.from_string(template) if notes_all else None


def _written(tree: nodes.Template) -> set[int]:
    """Return the identities of the nodes whose value is written and not used in any other way."""
    remaining = [node for output in tree.find_all(nodes.Output) for node in output.nodes]
    found: set[int] = set()
    while remaining:
        node = remaining.pop()
        found.add(id(node))
        if isinstance(node, nodes.Concat | nodes.Add):
            remaining.extend(node.iter_child_nodes())  # type: ignore[arg-type]  # of an expression, expressions
    return found


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


def _is_accepted(node: nodes.Node, is_written: bool, macros: Collection[str]) -> bool:
    if isinstance(node, nodes.Concat):
        return is_written
    if isinstance(node, nodes.Filter):
        return node.name == "tojson" and is_written
    if isinstance(node, nodes.Call):
        name = node.node.name if isinstance(node.node, nodes.Name) else ""
        return name in _CALLS or (name in macros and is_written)
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, nodes.Compare) and any(operand.op in ("in", "notin") for operand in node.ops):
        return isinstance(node.expr, nodes.Const) and len(node.ops) == 1  # what is asked notes it, not what is sought
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Add | nodes.Sub):
        return isinstance(node.arg.right, nodes.Const) and isinstance(node.arg.right.value, int)  # loop.index0 - 1
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const)
    return isinstance(node, _ACCEPTED)


def _watched_text(looks: list[str]) -> Callable[[str], str]:
    """Return a type of text that adds to ``looks`` what is done with it, unless it is harmless."""

    def noting(name: str) -> Callable[..., Any]:
        def method(self: str, *values: Any) -> Any:
            looks.append(name)
            return getattr(str, name)(self, *values)

        return method

    def attribute(self: str, name: str) -> Any:
        if name != "__class__":  # which isinstance asks for
            looks.append(name)
        return str.__getattribute__(self, name)

    watched: Any = type("WatchedText", (str,), {name: noting(name) for name in _LOOKS})
    watched.__getattribute__ = attribute
    watched.__bool__ = lambda self: True
    watched.__add__ = lambda self, other: watched(str.__add__(self, other))
    watched.__radd__ = lambda self, other: watched(str.__add__(other, self))
    return watched


def _watch(value: Any, watched: Callable[[str], str]) -> Any:
    """Return nested messages with a watched text in place of every hole."""
    if isinstance(value, Mapping):
        return {key: _watch(item, watched) for key, item in value.items()}
    if isinstance(value, list):
        return [_watch(item, watched) for item in value]
    return watched(value) if isinstance(value, str) and HOLE in value else value
