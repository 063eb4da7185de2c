"""Evaluate arithmetic in numbers that users write, such as ``576*32*32``."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

LONGEST_TEXT = 100
LARGEST_RESULT = 2**63
LARGEST_EXPONENT = 63

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def evaluate(text: str) -> int | float:
    r"""Return the value of an arithmetic expression of numbers, ``+ - * // **`` and parentheses.

    ``\*`` is read as ``*``: the official README escapes it for shells that expand a bare star.

    Args:
        text: Expression of at most 100 characters.

    Raises:
        ValueError: the text is something else, or its result is not finite or above 2**63.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"longer than {LONGEST_TEXT} characters")
    try:
        tree = ast.parse(text.replace("\\*", "*").strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not a number or an expression of numbers") from error
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _combine(node.op, _value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * // ** and parentheses are allowed")


def _combine(kind: ast.operator, left: float, right: float) -> int | float:
    if isinstance(kind, ast.Pow) and not 0 <= right <= LARGEST_EXPONENT:
        raise ValueError(f"exponents go from 0 to {LARGEST_EXPONENT}")
    try:
        return _bounded(_OPERATORS[type(kind)](left, right))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _bounded(value: object) -> int | float:
    if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > LARGEST_RESULT:
        raise ValueError("the result is not a finite number of ordinary size")
    return value
