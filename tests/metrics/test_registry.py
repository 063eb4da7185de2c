"""Metrics against values by hand, of their papers and of reference implementations."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.evaluate.scoring import evaluate
from qwenvl.metrics.base import Case, Scored
from qwenvl.metrics.boxes import Box, matched_overlaps, overlap, read_boxes
from qwenvl.metrics.choice import read_choice, read_options
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.registry import METRICS, choose_metric, find_metric, score_lines, to_case
from qwenvl.metrics.text import edit_distance, final_answer
from qwenvl.utils.errors import UserError

edges = st.integers(0, 1000)
boxes = st.tuples(edges, edges, edges, edges).map(
    lambda box: (
        float(min(box[0], box[2])),
        float(min(box[1], box[3])),
        float(max(box[0], box[2]) + 1),
        float(max(box[1], box[3]) + 1),
    )
)
words = st.text("abc ", max_size=8)


def score(name: str, prediction: str, *expected: str, question: str = "") -> float:
    return METRICS[name].score(Case(question, expected, prediction)).value


def as_answer(box: Box) -> str:
    return json.dumps({"bbox_2d": list(box), "label": "x"})


@pytest.mark.parametrize(
    ("answer", "right"), [("7", 1), (" 7\n", 1), ("17", 0), ("", 0), ("seven", 1), ("Seven", 0), ("7.0", 0)]
)
def test_exact_match_takes_any_accepted_answer(answer: str, right: float) -> None:
    assert score("exact_match", answer, "7", "seven") == right


# relaxed_correctness of google-research/pix2struct, pix2struct/metrics.py
@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("52%", "50%", 1),
        ("53%", "50%", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("Yes", "yes", 1),
        ("No", "yes", 0),
        ("abc", "100", 0),
        ("2012", "2020", 1),
    ],
)
def test_relaxed_match_is_that_of_chartqa(answer: str, expected: str, right: float) -> None:
    assert score("relaxed_match", answer, expected) == right


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("hello", ("hello",), 1),
        ("HELLO ", ("hello",), 1),
        ("helo", ("hello",), 0.8),
        ("abcd", ("abxy",), 0),  # half is gone: the threshold is reached
        ("abcde", ("abcxy",), 0.6),
        ("the cola", ("coca cola", "cola"), 1 - 4 / 9),
        ("", ("",), 1),
        ("", ("a",), 0),
    ],
)
def test_anls_by_hand(answer: str, expected: tuple[str, ...], value: float) -> None:
    assert score("anls", answer, *expected) == pytest.approx(value)


def test_edit_distances_are_the_textbook_ones() -> None:
    for first, second, distance in (("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("a", "a", 0)):
        assert edit_distance(first, second) == edit_distance(second, first) == distance


@given(words, words, words)
def test_edit_distance_is_a_distance(first: str, second: str, third: str) -> None:
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, second) == edit_distance(second, first)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)


OPTIONS = "What is it?\nA. cat\nB. dog\nC. the cow"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((text, "B") for text in ("B", "b", "(B)", "B.", "**B**", "B. dog", "(B) dog", "B) dog", "B: a dog")),
        *(
            (text, "B")
            for text in ("The answer is B", "The correct answer is (B).", "Answer: **B**", "option B, I think")
        ),
        *((text, "B") for text in ("dog", "Dog.", "It is a dog.", "The answer is a dog")),
        ("answer A? No, the answer is B.", "B"),
        ("The cow", "C"),
        *((text, None) for text in ("", "cat or dog", "I don't know", "E", "maybe", "dogma")),
    ],
)
def test_letters_are_read_from_answers(answer: str, letter: str | None) -> None:
    assert read_choice(answer, read_options(OPTIONS)) == letter
    scored = METRICS["multiple_choice"].score(Case(OPTIONS, ("B",), answer))
    assert (scored.value, scored.readable) == (float(letter == "B"), letter is not None)


def test_options_are_read_from_questions() -> None:
    wanted = {"A": "cat", "B": "dog"}
    for question in ("Which?\nA. cat\nB. dog", "Which? (A) cat (B) dog", "Which?\nA: cat\nB: dog\n", "A) cat\nB) dog?"):
        assert list(read_options(question)) == list(wanted)
    assert read_options("Which? B. cat C. dog") == {} == read_options("Which?") == read_options("A. only")


@given(boxes, boxes)
def test_overlap_is_a_share_and_symmetric(first: Box, second: Box) -> None:
    assert 0 <= overlap(first, second) <= 1
    assert overlap(first, second) == overlap(second, first)
    assert overlap(first, first) == 1


@pytest.mark.parametrize(
    ("other", "expected"),
    [((0, 0, 10, 5), 0.5), ((5, 0, 15, 10), 1 / 3), ((10, 0, 20, 10), 0), ((3, 3, 3, 3), 0), ((8, 8, 2, 2), 0)],
)
def test_overlap_by_hand(other: Box, expected: float) -> None:
    assert overlap((0, 0, 10, 10), other) == pytest.approx(expected)


@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4))
def test_no_other_matching_of_boxes_is_better(found: list[Box], wanted: list[Box]) -> None:
    overlaps = matched_overlaps(found, wanted)
    assert len(overlaps) == max(len(found), len(wanted))
    few, many = sorted((found, wanted), key=len)
    orders = itertools.permutations(many, len(few))
    assert sum(overlaps) == pytest.approx(max(sum(map(overlap, few, order)) for order in orders))


@given(st.lists(boxes, min_size=1, max_size=3))
def test_boxes_survive_every_form_of_writing(found: list[Box]) -> None:
    objects = [{"bbox_2d": list(box), "label": "a [red] box"} for box in found]
    tokens = "".join(
        f"<|object_ref_start|>x<|object_ref_end|><|box_start|>({a:g},{b:g}),({c:g},{d:g})<|box_end|>"
        for a, b, c, d in found
    )
    listed = json.dumps(objects)
    forms = [listed, f"```json\n{json.dumps(objects, indent=1)}\n```", tokens, tokens.replace("<|box_start|>", "")]
    forms += [listed.replace("bbox_2d", "bbox")]
    assert all(read_boxes(form) == found for form in forms)
    bare = " ".join(str(list(box)) for box in found)  # of ms-swift's <bbox> alone
    assert read_boxes(bare, bare=True) == found
    assert read_boxes(bare) == []
    assert read_boxes(listed[:-3]) == found  # cut short
    assert read_boxes(as_answer(found[0])) == found[:1]


@pytest.mark.parametrize(
    "answer",
    ["", "7", "{", "[1, 2, 3]", "1, 2, 3, 4", '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": [1, 2, 3, "4"]}', '{"box": 1}'],
)
def test_what_is_no_box_is_wrong_and_counted(answer: str) -> None:
    assert read_boxes(answer) == []
    for name in ("box_iou", "box_accuracy"):
        scored = METRICS[name].score(Case("", (as_answer((1, 2, 3, 4)),), answer))
        assert (scored.value, scored.readable) == (0, False)


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ('{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 80', [(1, 2, 3, 4)]),  # may have been 800
        ("<bbox>1 2 3 4</bbox>", [(1, 2, 3, 4)]),
        ("scroll(start_box='(1,2,3,4)')", [(1, 2, 3, 4)]),
        *(
            (answer, [])
            for answer in ("drag(1, 2, 3, 4)", "click(3, 4)", '{"point_2d": [1, 2]}', '"bbox": [1, x, 3, 4]')
        ),
    ],
)
def test_boxes_are_read_in_the_forms_that_training_converts(answer: str, boxes: list[Box]) -> None:
    assert read_boxes(answer) == boxes


def test_half_an_overlap_is_enough_and_less_is_not() -> None:
    expected = as_answer((0, 0, 100, 100))
    assert score("box_accuracy", as_answer((0, 0, 100, 50)), expected) == 1
    assert score("box_accuracy", as_answer((0, 0, 100, 49)), expected) == 0
    assert score("box_iou", as_answer((0, 0, 100, 50)), expected) == 0.5


def test_boxes_too_many_and_too_few_are_misses() -> None:
    one, two = as_answer((0, 0, 10, 10)), as_answer((20, 20, 30, 30))
    both = f"[{two}, {one}]"
    for name in ("box_iou", "box_accuracy"):
        assert score(name, both, f"[{one}, {two}]") == 1
        assert score(name, one, both) == score(name, both, one) == 0.5


@pytest.mark.parametrize(
    ("answer", "valid", "equal"),
    [
        ('{"a": 1, "b": [2]}', 1, 1),
        ('```json\n{"b": [2.0], "a": 1}\n```', 1, 1),
        ('{"a": 1}', 1, 0),
        ('{"a": 1', 0, 0),
        ('{"a": NaN}', 0, 0),
        ("[" * 100_000, 0, 0),
        ("", 0, 0),
    ],
)
def test_json_is_parsed_and_compared_by_value(answer: str, valid: float, equal: float) -> None:
    expected = '{"a": 1, "b": [2]}'
    assert (score("json_valid", answer, expected), score("json_equal", answer, expected)) == (valid, equal)


TEXTS = [
    ("A dog runs over the green grass.", ("A dog is running on the grass.", "The dog runs over green grass.")),
    ("Two men sit at a table", ("Two men are sitting at a small table",)),
    ("A plane", ("A red plane flies in the blue sky",)),
]


def test_captions_are_scored_as_sacrebleu_does() -> None:
    cases = [Case("", expected, prediction) for prediction, expected in TEXTS]
    predictions = [prediction for prediction, _ in TEXTS]
    streams = [[expected[k] if k < len(expected) else None for _, expected in TEXTS] for k in range(2)]
    bleu = METRICS["bleu"]
    statistics = np.array([bleu.statistics(bleu.score(case)) for case in cases])
    wanted = sacrebleu.corpus_bleu(predictions, streams).score / 100
    assert bleu.total(statistics.sum(axis=0), 3) == pytest.approx(wanted)
    assert 0.1 < wanted < 0.9
    chrf = [METRICS["chrf"].score(case).value for case in cases]
    assert chrf == [pytest.approx(sacrebleu.sentence_chrf(p, list(e)).score / 100) for p, e in TEXTS]
    for name in ("bleu", "chrf"):
        assert score(name, TEXTS[0][1][1], *TEXTS[0][1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("question", "expected", "name"),
    [
        ("?", ["7", "12"], "exact_match"),
        ("?", ["B", "C"], "exact_match"),
        (OPTIONS, ["B", "(C)"], "multiple_choice"),
        (OPTIONS, ["B", "dog"], "exact_match"),
        ("?", [as_answer((1, 2, 3, 4)), f"[{as_answer((1, 2, 3, 4))}]"], "box_accuracy"),
        ("?", ['{"a": 1}', "[1]"], "json_equal"),
        ("?", ['{"a": 1}', "no"], "exact_match"),
        ("?", ["a long sentence " * 5, "a longer sentence " * 6, "short"], "chrf"),
    ],
)
def test_the_metric_is_chosen_by_the_expected_answers(question: str, expected: list[str], name: str) -> None:
    assert choose_metric([Case(question, (one,), "") for one in expected]).name == name


def test_what_was_thought_is_no_part_of_an_answer() -> None:
    line = Prediction(0, "d", "f", 1, expected="7", accepted=("seven",), prediction="<think>\nIs it 8?\n</think>\n\n7")
    assert to_case(line) == Case("", ("7", "seven"), "7")


RIGHT: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("exact_match", "?", "green", ()),
    ("exact_match", "?", "red", ("green", "red")),
    ("relaxed_match", "?", "12", ()),
    ("anls", "?", "green", ()),
    ("multiple_choice", OPTIONS, "B", ()),
    ("box_accuracy", "?", as_answer((1, 2, 30, 40)), ()),
    ("box_iou", "?", as_answer((1, 2, 30, 40)), ()),
    ("json_equal", "?", '{"a": 1}', ()),
    ("json_valid", "?", '{"a": 1}', ()),
    ("bleu", "?", "a dog runs over the grass", ()),
    ("chrf", "?", "a dog runs over the grass " * 3, ()),
]
"""Metric, question, answer, accepted answers."""
THOUGHT = f"<think>\nIs it A, or {as_answer((9, 9, 99, 99))}? No.\n</think>\n\n"


@pytest.mark.parametrize(("name", "question", "answer", "accepted"), RIGHT)
def test_a_thought_is_taken_off_both_sides(name: str, question: str, answer: str, accepted: tuple[str, ...]) -> None:
    """The expected answer as it is trained; the model's without the tag that the prompt has opened."""
    right = {"expected": THOUGHT + answer, "accepted": tuple(THOUGHT + one for one in accepted)}
    for prediction in (THOUGHT + answer, THOUGHT.removeprefix("<think>\n") + answer, answer):
        line = Prediction(0, "d", "f", 1, question=question, prediction=prediction, **right)
        (scored,) = score_lines([line], METRICS[name])
        assert METRICS[name].total(np.array(METRICS[name].statistics(scored)), 1) == pytest.approx(1)
    wrong = Prediction(0, "d", "f", 1, question=question, prediction=THOUGHT + "nothing of it", **right)
    assert score_lines([wrong], METRICS[name])[0].value < 0.5


def test_the_metric_is_chosen_by_what_stands_behind_the_thought() -> None:
    lines = [Prediction(0, "d", "f", 1, expected=f"<think>{'word ' * 30}</think>7", prediction="7")]
    (scores,) = evaluate(lines)
    assert (scores.metric.name, scores.scored[0].value) == ("exact_match", 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", "7"),
        (" 7 ", " 7 "),
        ("<think>x</think>\n\n7", "7"),
        ("x</think>7", "7"),
        ("<think>x</think>y</think>7", "7"),
        ("<think>\nIs it B?", ""),
        ("<think></think>", ""),
        ("", ""),
    ],
)
def test_what_comes_after_a_thought(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_a_thought_that_was_cut_holds_no_answer() -> None:
    """Its last words would pass for one."""
    cut = Prediction(0, "d", "f", 1, question=OPTIONS, expected="B", prediction="The answer is B")
    assert score_lines([cut], METRICS["multiple_choice"])[0].value == 1
    unfinished = replace(cut, finish_reason="length", thought="unfinished")
    assert score_lines([unfinished], METRICS["multiple_choice"])[0] == Scored(0.0, readable=False)
    assert Prediction.from_json(unfinished.to_json()) == unfinished


def test_an_unknown_metric_is_one_message() -> None:
    with pytest.raises(UserError, match="'anlss' is not one of .*Did you mean 'anls'"):
        find_metric("anlss")
