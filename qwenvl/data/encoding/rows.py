"""Build the training rows of a conversation: the fewest in which every trained answer follows its own exact prompt ids.

A row is a text cut into pieces that are tokenized on their own: a prompt, the target, the text between it and the next
target, that target, and so on. An answer joins the row of an earlier one if its prompt begins with that row's
text, and if the prompt as a whole, as a server tokenizes it, has the same ids as the pieces. Otherwise it has a row of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenvl.data.conversation.chat_template import Rendering, TrainedTurn, weights_of
from qwenvl.data.types import History, LossOn

SameIds = Callable[[Sequence[str]], bool]
"""Function that tells whether pieces of text have the same ids one by one as in one piece."""


@dataclass(slots=True)
class _Row:
    """A row under construction."""

    text: str
    header: int  # where the header of its last answer begins
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    arguments: list[Mapping[str, Any]] = field(default_factory=list)
    untrained: list[tuple[int, int]] = field(default_factory=list)
    thinks: list[bool] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, turn: TrainedTurn, header: str, loss_on: LossOn) -> None:
        """Add an answer, whose prompt begins with the text of the row."""
        start, stop = len(turn.prompt), len(turn.prompt) + len(turn.target)
        self.text = turn.prompt + turn.target
        self.header = turn.prompt.rindex(header)
        self.spans.append((start, stop))
        self.turns.append(turn.message)
        self.arguments.append(turn.arguments)
        self.thinks.append(turn.thought > 0)
        self.weights.append(turn.weight)
        if loss_on == "answers" and turn.thought:
            self.untrained.append((start, start + turn.thought))
        if loss_on == "thoughts":
            self.untrained.append((start + turn.thought, stop))

    def goes_on_in(self, turn: TrainedTurn, same_ids: SameIds) -> bool:
        """Return whether an answer's prompt continues this row, in text and in ids."""
        if not turn.prompt.startswith(self.text):
            return False
        start, stop = self.spans[-1]
        return same_ids((self.text[self.header : start], self.text[start:stop], turn.prompt[stop:]))


def training_rows(
    turns: Sequence[TrainedTurn], header: str, same_ids: SameIds, history: History, loss_on: LossOn
) -> list[Rendering]:
    """Return the training rows of a conversation, in the order of their last answers.

    Args:
        turns: Trained answers of the conversation, in order.
        header: Text that opens an answer; it begins with a token that no text is merged with.
        same_ids: Function that tells whether pieces of text have the same ids one by one as in one piece.
        history: ``exact`` for all rows; ``last`` for the row of the last answer.
        loss_on: Answers, or parts of them, that are trained.
    """
    if loss_on == "last_turn":
        turns = turns[-1:]
    rows: list[_Row] = []
    for turn in turns:
        fitting = (row for row in sorted(rows, key=lambda row: -len(row.text)) if row.goes_on_in(turn, same_ids))
        row = next(fitting, None)
        if row is None:
            row = _Row("", 0)
            rows.append(row)
        row.add(turn, header, loss_on)
    rows.sort(key=lambda row: row.turns[-1])
    return [_finished(row) for row in (rows[-1:] if history == "last" else rows)]


def _finished(row: _Row) -> Rendering:
    return Rendering(
        text=row.text,
        spans=tuple(row.spans),
        turns=tuple(row.turns),
        arguments=tuple(row.arguments),
        untrained=tuple(row.untrained),
        thinks=tuple(row.thinks),
        weights=weights_of(row.weights),
    )
