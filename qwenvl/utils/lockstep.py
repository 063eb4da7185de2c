"""Work in stages on many things at a time: one stage for all of them, then the next.

Code and data of one stage stay in the processor's caches meanwhile. Where stages are short and unlike each other, as
those of counting tokens, this takes a third off the time. The work on one thing is a generator that yields between its
stages, so that it reads as if there were nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Stages: TypeAlias = Generator[None, None, T]


def finish(stages: Stages[T]) -> T:
    """Do all stages of one thing, and return what they return."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            result: T = end.value
            return result


def in_lockstep(works: Iterable[Stages[T]]) -> list[T]:
    """Do the stages of several things together; returns what they return, in order. The first error ends it all."""
    running = list(enumerate(works))
    results: dict[int, T] = {}
    while running:
        remaining = []
        for number, stages in running:
            try:
                next(stages)
            except StopIteration as end:
                results[number] = end.value
            else:
                remaining.append((number, stages))
        running = remaining
    return [results[number] for number in sorted(results)]
