"""The tokens of a sample as pieces of text for the page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokens

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoding of the bytes of an incomplete character
_LONGEST_CHARACTER = 8  # tokens; a text may hold the replacement character itself

PLAIN, TRAINED, VISION = 0, 1, 2


def pieces_of(tokens: Tokens, tokenizer: Any, losses: Sequence[float] | None = None) -> list[list[Any]]:
    """Return the stretches of a sample, in order.

    Each is ``[PLAIN or TRAINED, [[text, ids, is a special token], ...]]``, or ``[VISION, [token, id, count]]`` for a
    run of placeholders. The texts add up to the model's input; ``ids`` are separated by spaces, and there are several
    if a character takes several tokens. With ``losses``, trained pieces have a fourth element: their greatest loss.

    Args:
        tokens: Tokens of the sample.
        tokenizer: Tokenizer of the checkpoint.
        losses: Loss of each trained token that is predicted, in nats; None for none.
    """
    left = iter(losses or ())
    trained = (tokens.labels != IGNORE_INDEX).tolist()
    marks = zip(tokens.input_ids.tolist(), trained, tokens.vision_mask.tolist(), strict=True)
    special = set(tokenizer.all_special_ids)
    stretches: list[list[Any]] = []
    for (is_trained, is_vision, same), group in itertools.groupby(
        marks, key=lambda mark: (mark[1], mark[2], mark[0] if mark[2] else None)
    ):
        ids = [mark[0] for mark in group]
        if is_vision:
            stretches.append([VISION, [tokenizer.decode([same]), same, len(ids)]])
        else:
            texts = _texts(ids, tokenizer, special)
            if is_trained and losses is not None:
                for text in texts:
                    text.append(round(max(itertools.islice(left, len(text[1].split()))), 3))
            stretches.append([TRAINED if is_trained else PLAIN, texts])
    return stretches


def _texts(ids: Sequence[int], tokenizer: Any, special: set[int]) -> list[list[Any]]:
    """Return [text, ids, is special] of each token; tokens that form one character together are one piece."""
    found, open_ids = list[list[Any]](), list[int]()
    for token in ids:
        open_ids.append(token)
        text = tokenizer.decode(open_ids)
        if text.endswith(_UNFINISHED) and len(open_ids) < _LONGEST_CHARACTER:
            continue
        found.append([text, " ".join(map(str, open_ids)), int(token in special)])
        open_ids = []
    if open_ids:
        found.append([tokenizer.decode(open_ids), " ".join(map(str, open_ids)), 0])
    return found
