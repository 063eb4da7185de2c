"""One-place changes of a source file, each of which a test should notice."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from types import CodeType
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[str, type[ast.cmpop]]] = {
    ast.Lt: ("boundary", ast.LtE),
    ast.LtE: ("boundary", ast.Lt),
    ast.Gt: ("boundary", ast.GtE),
    ast.GtE: ("boundary", ast.Gt),
    ast.Eq: ("comparison", ast.NotEq),
    ast.NotEq: ("comparison", ast.Eq),
    ast.In: ("comparison", ast.NotIn),
    ast.NotIn: ("comparison", ast.In),
    ast.Is: ("comparison", ast.IsNot),
    ast.IsNot: ("comparison", ast.Is),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PAIRS = (
    "min max, any all, floor ceil, argmin argmax, minimum maximum, zeros ones, amin amax, cumsum cumprod, round floor"
)
TYPES = (
    "float32 float64, float16 float32, bfloat16 float32, int64 int32, int32 int16, uint8 int16, long int, float double"
)
INDICES = ("np", "int64")  # the width of whole numbers that are indices makes no difference
# Calls whose arguments' order cannot matter, or where exchanging them is only a crash.
ORDERLESS = {
    "min",
    "max",
    "isinstance",
    "issubclass",
    "getattr",
    "hasattr",
    "setattr",
    "cast",
    "gcd",
    "minimum",
    "maximum",
}
GUARDS = {"strict"}  # keywords that only find what cannot happen, as an assertion does
# Read by people or by type checkers: what they say is not what this looks for.
UNREAD = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Global, ast.Nonlocal)
UNREAD_FIELDS = {"annotation", "returns", "decorator_list", "bases", "type_params"}
Edit = tuple[str, Any]  # kind, what the field becomes


def _swapped(pairs: str) -> dict[str, str]:
    both = [pair.split() for pair in pairs.split(",")]
    return {right: left for left, right in both} | dict(both)


FUNCTIONS, DTYPES = _swapped(PAIRS), _swapped(TYPES)


@dataclass(frozen=True)
class Mutant:
    """A change of one field of one node of a parsed file.

    Attributes:
        kind: group of the change, by which samples are spread.
        function: dotted name of the function or class that holds it; empty for a module's own lines.
        before: changed lines of the smallest statement, as ``ast.unparse`` writes them.
        after: the same lines with the change.
        lines: line numbers of the changed expression.
    """

    kind: str
    function: str
    before: str
    after: str
    lines: tuple[int, ...]
    owner: ast.AST
    field: str
    value: Any

    def compiled(self, tree: ast.Module, filename: str) -> CodeType:
        """Return the code of the tree that the mutant was found in with the change; the tree stays as it is."""
        original = getattr(self.owner, self.field)
        setattr(self.owner, self.field, self.value)
        code = compile(ast.fix_missing_locations(tree), filename, "exec")
        setattr(self.owner, self.field, original)
        return code

    def rank(self, seed: int) -> str:
        """Return a number at random that edits elsewhere in the file do not change."""
        return hashlib.sha256(f"{seed}|{self.function}|{self.before}|{self.after}".encode()).hexdigest()


def mutants(tree: ast.Module) -> list[Mutant]:
    """Return every change of the file, in its order; each text once."""
    found = {(m.function, m.before, m.after): m for m in reversed(list(_walk(tree, None, "")))}
    return list(found.values())[::-1]


def sample(candidates: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return ``count`` of them at random, one of each kind before two of any; all of them for ``count`` 0."""
    by_kind: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(candidates, key=lambda one: one.rank(seed)):
        by_kind[mutant.kind].append(mutant)
    spread = [one for layer in zip_longest(*by_kind.values()) for one in layer if one is not None]
    return spread[: count or None]


def _walk(owner: ast.AST, statement: ast.stmt | None, function: str) -> Iterator[Mutant]:
    """Yield the mutants of a node and of all below it."""
    for field, value in ast.iter_fields(owner):
        if field in UNREAD_FIELDS or isinstance(owner, ast.Raise) or _is_log(owner):
            continue
        children = value if isinstance(value, list) else [value]
        for kind, changed in _edits(owner, field, value):
            yield from _mutant(kind, owner, field, changed, statement, function, owner, None)
        for place, child in enumerate(children):
            if not isinstance(child, ast.AST) or _is_unread(child):
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            name = f"{function}.{child.name}".lstrip(".") if isinstance(child, _NAMED) else function
            for kind, new in _replacements(child, owner, field):
                changed = [*value[:place], new, *value[place + 1 :]] if isinstance(value, list) else new
                yield from _mutant(kind, owner, field, changed, inner, name, child, new)
            yield from _walk(child, inner, name)


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _mutant(
    kind: str,
    owner: ast.AST,
    field: str,
    value: Any,
    statement: ast.stmt | None,
    function: str,
    node: ast.AST,
    new: Any,
) -> Iterator[Mutant]:
    """Yield the mutant, unless its text is the same.

    Args:
        value: what the field of the owner becomes.
        statement: the smallest one that holds the change.
        node: the changed expression or statement.
        new: what stands in its place; None where a part of it changed.
    """
    whole = statement if statement is not None else owner
    before, original = ast.unparse(whole), getattr(owner, field)
    setattr(owner, field, value)
    after = ast.unparse(new if node is statement and new is not None else whole)
    setattr(owner, field, original)
    old, now = before.splitlines(), after.splitlines()
    changes = [op for op in difflib.SequenceMatcher(None, old, now, autojunk=False).get_opcodes() if op[0] != "equal"]
    if changes:
        (_, first, _, start, _), (_, _, last, _, end) = changes[0], changes[-1]
        texts = ("\n".join(line.strip() for line in lines) for lines in (old[first:last], now[start:end]))
        yield Mutant(kind, function, *texts, _lines(node, statement), owner, field, value)


def _lines(node: ast.AST, statement: ast.stmt | None) -> tuple[int, ...]:
    """Return the lines of an expression, and the first of a statement that holds no others."""
    located: Any = node if hasattr(node, "lineno") else statement
    lines = set(range(located.lineno, located.end_lineno + 1)) if located is not None else set()
    if statement is not None and not hasattr(statement, "body"):
        lines.add(statement.lineno)
    return tuple(sorted(lines))


def _edits(owner: ast.AST, field: str, value: Any) -> Iterator[Edit]:
    """Yield what a field of a node may become where it is the node's own, not a child's."""
    match owner, field:
        case ast.Compare(), "ops":
            for place, op in enumerate(value):
                kind, other = COMPARISONS[type(op)]
                yield kind, [*value[:place], other(), *value[place + 1 :]]
        case ast.BoolOp(), "op":
            yield "logic", ast.Or() if isinstance(value, ast.And) else ast.And()
        case ((ast.BinOp() | ast.AugAssign()), "op") if type(value) in ARITHMETIC and not _has_text(owner):
            yield "arithmetic", ARITHMETIC[type(value)]()
        case ast.comprehension(), "ifs" if value:
            yield "condition", []
        case ast.Slice(), ("lower" | "upper") if value is not None:
            yield "slice", None
        case ((ast.Call() | ast.Attribute()), _):
            yield from _call_edits(owner, field, value)


def _call_edits(owner: ast.Call | ast.Attribute, field: str, value: Any) -> Iterator[Edit]:
    """Yield other arguments of a call, and the names of other functions and types."""
    match owner, field:
        case ast.Attribute(), "attr" if value in FUNCTIONS:
            yield "function", FUNCTIONS[value]
        case ast.Attribute(value=ast.Name(id=library)), "attr" if value in DTYPES and (library, value) != INDICES:
            yield "dtype", DTYPES[value]
        case ast.Call(), "args" if len(value) == 2 and _name(owner.func) not in ORDERLESS and not _starred(value):
            yield "swap", value[::-1]
        case ast.Call(), "keywords" if not _name(owner.func).endswith(("Error", "Warning")):
            for place in (n for n, one in enumerate(value) if one.arg not in GUARDS):
                yield "keyword", value[:place] + value[place + 1 :]


def _replacements(node: ast.AST, owner: ast.AST, field: str) -> Iterator[Edit]:
    """Yield what may stand in a node's place."""
    match node:
        case ast.Constant(value=value):
            yield from _constants(value, owner)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield ("logic" if isinstance(node.op, ast.Not) else "number"), operand
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):  # rounded up
            minus = ast.UnaryOp(ast.USub(), left)
            yield "boundary", ast.UnaryOp(ast.USub(), ast.BinOp(minus, ast.FloorDiv(), right))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "condition", ast.IfExp(test, orelse, body)
        case ast.Name(id=name) if field == "func" and name in FUNCTIONS:
            yield "function", ast.Name(FUNCTIONS[name], ast.Load())
        case ast.Call(func=ast.Attribute(value=receiver), args=[], keywords=[]) if not isinstance(owner, ast.Expr):
            yield "call", receiver
        case ast.stmt():
            yield from _statements(node)
    if field == "test" and isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.NamedExpr | ast.Subscript):
        yield "condition", ast.UnaryOp(ast.Not(), node)


def _statements(node: ast.stmt) -> Iterator[Edit]:
    """Yield what may stand in a statement's place."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.Await()) | ast.Raise() | ast.AugAssign():
            yield "statement", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", ast.Pass()
        case ast.Continue():
            yield "statement", ast.Break()
        case ast.Break():
            yield "statement", ast.Continue()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return", ast.Return(ast.Constant(None))


def _constants(value: object, owner: ast.AST) -> Iterator[Edit]:
    """Yield other constants: a flag the other way, a number one off, a text that is empty."""
    if isinstance(value, bool):
        yield "flag", ast.Constant(not value)
    elif isinstance(value, int | float):
        yield "number", ast.Constant(value + 1)
        yield "number", ast.Constant(value - 1)
    elif isinstance(value, str) and not isinstance(owner, ast.Subscript | ast.Dict | ast.FormattedValue):
        yield "text", ast.Constant("" if value else "?")


def _name(function: ast.expr) -> str:
    """Return the last part of a called name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_log(node: ast.AST) -> bool:
    """Return whether a call only writes to the log; what it says is for people."""
    receiver = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    return isinstance(receiver, ast.Name) and receiver.id in ("logger", "warnings")


def _is_unread(node: ast.AST) -> bool:
    """Return whether a change below the node is of no interest: docstrings, assertions, what people read."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    guard = isinstance(node, ast.keyword) and node.arg in GUARDS
    return docstring or guard or isinstance(node, UNREAD)


def _has_text(node: ast.AST) -> bool:
    """Return whether an operand is text or a list, for which the other operators only crash."""
    literals = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple)
    sides = [getattr(node, name, None) for name in ("left", "right", "value")]
    return any(isinstance(side, literals) or isinstance(getattr(side, "value", None), str) for side in sides)


def _starred(nodes: list[ast.expr]) -> bool:
    return any(isinstance(node, ast.Starred) for node in nodes)
