"""Find the written forms of boxes and points in texts and tool calls, and the places of their numbers.

From the families' cookbooks (2d_grounding, computer_use and mobile_use of QwenLM/Qwen3-VL), UI-TARS and ms-swift:

- keys of JSON, fenced or not, also inside a JSON string, and named arguments: :data:`KEYS`, with a list, a list of
  lists, or numbers in round brackets, in quotes or not;
- numbers between special tokens or tags: :data:`MARKS`;
- calls such as ``click(150, 112)`` and ``pyautogui.click(x=150, y=112)``: :data:`CALLS`; with two points
  (``swipe(1, 2, 3, 4)``): :data:`STROKES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

KEYS = {
    **dict.fromkeys(("bbox_2d", "bbox"), (4,)),
    **dict.fromkeys(("point_2d", "point", "coordinate", "coordinate2", "start_point", "end_point"), (2,)),
    **dict.fromkeys(("start_box", "end_box"), (2, 4)),
}
"""JSON keys and names of arguments, and how many numbers each has."""

MARKS = {"box": (2, 4), "quad": (8,), "<point>": (2,), "<box>": (2, 4), "<bbox>": (2, 4)}
"""Names of the special tokens around a box, or its tag, and how many numbers it has."""

CALLS = (
    *("click", "doubleClick", "tripleClick", "rightClick", "middleClick", "moveTo", "dragTo", "mouse_move", "hover"),
    *("left_click", "right_click", "middle_click", "double_click", "triple_click", "left_single", "right_single"),
    *("left_double", "tap", "long_press"),
)
"""Functions whose first two arguments are a point, counted from the corner of the image."""

STROKES = ("swipe", "drag")
"""Functions whose four arguments are two points; with fewer they are distances, which are left alone."""

COUNTS = {**KEYS, **MARKS, **dict.fromkeys(CALLS, (2,)), **dict.fromkeys(STROKES, (4,))}

Write = Callable[[Sequence[str], str, str], Sequence[str]]
"""Function from the items of a box, its kind (a key of :data:`COUNTS`) and its text for messages to new items."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ITEM = re.compile(r"[^\s,()\[\]]+")
_RUN = re.compile(r"[^\[\]]+")  # a box of a list of boxes
_ALTERNATIVES = "|".join(KEYS)
_X, _Y = (rf"(?:{axis}\s{{0,9}}=\s{{0,9}})?{_NUMBER.pattern}" for axis in "xy")
_NEXT = r"\s{0,9},\s{0,9}"
# JSON inside a JSON string has its quotes escaped, once or more. Repetitions are bounded where something has to
# follow them: otherwise each start of one would be followed to the end of the text.
_WRITTEN = re.compile(
    rf"""(?:["'](?P<key>{_ALTERNATIVES})\\{{0,99}}["']\s{{0,99}}:|\b(?P<argument>{_ALTERNATIVES})\s{{0,9}}=)"""
    r"""\s{0,99}\\{0,99}["']?(?:\[(?P<list>(?:[^\[\]]|\[[^\[\]]*\]?)*)\]?"""
    rf"""|(?P<tuple>\([^()]*\)?(?:{_NEXT}\([^()]*\)?)?))"""
    r"""|<\|(?P<token>box|quad)_start\|>(?P<inside>.{0,999}?)<\|(?P=token)_end\|>"""
    r"""|(?P<tag><(?P<name>point|b?box)>)(?P<content>.{0,999}?)</(?P=name)>"""
    rf"""|\b(?P<call>{"|".join(CALLS)})\(\s{{0,9}}[\[(]?\s{{0,9}}(?P<at>{_X}{_NEXT}{_Y})"""
    rf"""|\b(?P<stroke>{"|".join(STROKES)})\(\s{{0,9}}(?P<ends>{_X}(?:{_NEXT}{_NUMBER.pattern}){{3}})\s{{0,9}}\)""",
    re.DOTALL,
)
_KINDS = ("key", "argument", "token", "tag", "call", "stroke")
_BODIES = ("list", "tuple", "inside", "content", "at", "ends")


def as_number(item: str) -> float | None:
    """Return an item of a box as a number; None where it is something else."""
    return float(item) if _NUMBER.fullmatch(item) else None


def rewrite(text: str, write: Write) -> str:
    """Replace the items of every box and point of a text; nothing else of it changes.

    A list without any number, such as ``[x1, y1, x2, y2]`` in an instruction, is left alone.
    """

    def box(match: re.Match[str]) -> str:
        kind = next(match[name] for name in _KINDS if match[name])
        body = next(name for name in _BODIES if match[name] is not None)
        item = _NUMBER if body in ("at", "ends") else _ITEM

        def one(run: re.Match[str]) -> str:
            items = item.findall(run[0])
            if not any(_NUMBER.fullmatch(found) for found in items):
                return run[0]
            written = iter(write(items, kind, match[0]))
            return item.sub(lambda _: next(written), run[0])

        start, end = (place - match.start() for place in match.span(body))
        return match[0][:start] + _RUN.sub(one, match[body]) + match[0][end:]

    return _WRITTEN.sub(box, text)


def read(text: str) -> list[tuple[float, ...]]:
    """Return the numbers of each box and point that a text has under a key or mark, in order.

    Boxes that hold anything but numbers are left out, and so is a last one that is cut off.
    """
    found: list[tuple[float, ...]] = []

    def note(items: Sequence[str], kind: str, shown: str) -> Sequence[str]:
        numbers = tuple(number for item in items if (number := as_number(item)) is not None)
        if kind in (*KEYS, *MARKS) and len(numbers) == len(items) and shown[-1] in "])>":
            found.append(numbers)
        return items

    rewrite(text, note)
    return found


def rewrite_value(value: str, key: str, write: Write) -> str:
    """Replace the items of a box that is the whole text under a key of :data:`KEYS`, such as ``(150,112)``."""
    before = f'"{key}": "'
    return rewrite(before + value, write)[len(before) :]
