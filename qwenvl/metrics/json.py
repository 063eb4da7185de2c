"""Answers in JSON: whether they parse, and whether their values are equal."""

from __future__ import annotations

import json
import re
from typing import Any

from qwenvl.metrics.base import Case, Metric, Scored

_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def read_json(text: str) -> tuple[bool, Any]:
    """Parse an answer, without its ```json fence where it has one.

    Returns:
        Whether it is JSON (RFC 8259: NaN and Infinity are not), and its value.
    """
    fenced = _FENCE.fullmatch(text)
    try:
        return True, json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _valid(case: Case) -> Scored:
    valid, _ = read_json(case.prediction)
    return Scored(float(valid), readable=valid)


def _equal(case: Case) -> Scored:
    valid, value = read_json(case.prediction)
    wanted = [found for is_json, found in map(read_json, case.expected) if is_json]
    return Scored(float(valid and value in wanted), readable=valid)


JSON_VALID = Metric("json_valid", "JSON validity", "share of answers that parse (RFC 8259)", _valid)
JSON_EQUAL = Metric("json_equal", "JSON equality", "share of answers whose parsed value is the expected one", _equal)
