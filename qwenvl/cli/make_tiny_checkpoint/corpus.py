"""The training text of the tiny tokenizer, like the text of the demo data and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
DIRECTIONS = ("left", "right", "up", "down")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PROSE = """
You are a helpful assistant. You answer questions about pictures and videos, shortly and exactly.
The picture shows a small square near the left side, and a larger circle below it.
What is in this image? Describe the image in detail. Describe the video. What happens in the video?
Which digit is written? Which picture shows the larger digit, the first or the second? Are both digits the same?
Which way does the square move? It moves to the left, to the right, up or down. It does not move at all.
Locate the object and give its box as JSON. Where is it? How many objects are there? Count them.
Read the text in the picture. The answer is yes. The answer is no. There is nothing of that kind here.
First, look at the question. Then think about the answer step by step, and write only the final answer.
Let me think about this. I should look at the picture again. So the answer must be the second one.
A user asks and an assistant answers; a system message or a tool may say something in between.
These are the tools that may be called with their names, parameters and arguments: the function and its response.
The weather in the city is sunny, with a temperature of twenty degrees and a light wind from the north.
Between the times of zero and four seconds the shape goes from one side of the frame to the other.
This is a longer sentence, with commas, quotes and brackets (like these ones), which the tokenizer can learn from.
"""


def _lines() -> Iterator[str]:
    """Yield each different line of the corpus once."""
    yield from PROSE.strip().splitlines()
    for colour, shape in product(COLOURS, SHAPES):
        yield f"Locate the {colour} {shape}."
        yield f'{{"bbox_2d": [12, 345, 678, 900], "label": "{colour} {shape}"}}'
        yield f"The {colour} {shape} is above the other {shape}."
    for direction in DIRECTIONS:
        yield f"The square moves {direction}. Which way? {direction}"
    for digit, number in enumerate(NUMBERS):
        yield f"The digit {digit} is written as {number}. Picture {digit}: Video {digit}: <{digit}.5 seconds>"
    yield '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius"}}'
    # Runs of newlines and spaces are single tokens in Qwen's vocabulary, as are the names of the roles.
    yield from ("user\n\n", "assistant\n\n", "system\n\n\n", "tool\n\n", "if x:\n    return\n        y\n")
    yield '{"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}'


def corpus() -> list[str]:
    """Return the lines of the corpus, in a fixed order, each twice so that every word can be merged."""
    return [line + "\n" for line in _lines() for _ in range(2)]
