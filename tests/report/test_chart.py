"""Curves of runs: any values and any number of them make a small drawing that shows their extremes."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.report.chart import Chart, Line, Point, draw, thin
from qwenvl.report.curves import evaluation_charts, series, training_charts
from qwenvl.report.scales import linear_ticks, log_ticks, short, tick_label
from tests.cli.pages import Page

VALUES = st.floats(allow_nan=True, allow_infinity=True)
CURVES = st.lists(VALUES, min_size=1, max_size=300).map(lambda values: tuple(enumerate(map(float, values), start=1)))


def finite(points: tuple[Point, ...] | list[Point]) -> list[float]:
    return [value for _, value in points if abs(value) < 1e300]


@given(CURVES, st.integers(1, 40))
def test_thinned_points_keep_ends_and_extremes_and_are_few(points: tuple[Point, ...], buckets: int) -> None:
    kept = thin(points, buckets)
    assert len(kept) <= max(2 * buckets + 2, 1)
    remaining = iter(points)
    assert all(any(one is point for one in remaining) for point in kept)  # some of them, in their order
    assert kept[0] is points[0] and kept[-1] is points[-1]
    if finite(points):
        assert (min(finite(kept)), max(finite(kept))) == (min(finite(points)), max(finite(points)))
    if len(points) <= 2 * buckets:
        assert kept == list(points)


def test_a_stretch_without_numbers_leaves_a_gap_in_long_curves_too() -> None:
    points = [(float(step), math.nan if 400 <= step < 600 else 1.0) for step in range(1000)]
    drawing = draw(Chart("Loss", (Line("loss", tuple(points)),)))
    assert drawing.count("<polyline") == 2
    assert "200 values not finite" in drawing


@given(st.lists(CURVES, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_every_curve_stays_inside_the_drawing(curves: list[tuple[Point, ...]], log: bool, percent: bool) -> None:
    lines = tuple(Line(f"<{place}> & co", points) for place, points in enumerate(curves))
    drawing = draw(Chart("A & B", lines, log=log, percent=percent))
    assert Page(drawing).open == []
    if not any(finite(points) for points in curves):
        assert "<svg" not in drawing
        return
    svg = drawing[drawing.index('<svg class="chart"') :]
    _, _, width, height = (float(number) for number in re.search(r'viewBox="([^"]+)"', svg)[1].split())  # type: ignore[index]
    pairs = [place.split(",") for places in re.findall(r'points="([^"]*)"', svg) for place in places.split()]
    pairs += re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg) + re.findall(r'<text x="([^"]+)" y="([^"]+)"', svg)
    assert pairs
    for x, y in pairs:
        assert 0 <= float(x) <= width and 0 <= float(y) <= height
    assert all(float(size) >= 0 for size in re.findall(r'width="([^"]+)" height', svg))
    assert svg.count("<text") <= 20  # ticks do not crowd


def test_one_value_is_a_dot_and_a_sentence() -> None:
    drawing = draw(Chart("Loss", (Line("training", ((1, 0.7),)),)))
    assert drawing.count("<circle") == 1 and "<polyline" not in drawing
    assert 'aria-label="Loss: 0.7 at step 1"' in drawing


def test_values_are_told_where_the_page_is_moved_over() -> None:
    lines = (Line("training", ((1, 6.0), (2, 0.5), (3, 0.25))), Line("evaluation", ((2, 0.75),)))
    drawing = draw(Chart("Loss", lines, log=True))
    assert "<title>step 2\ntraining: 0.5\nevaluation: 0.75</title>" in drawing
    assert "<title>step 3\ntraining: 0.25\nevaluation: 0.75 (step 2)</title>" in drawing
    assert "training: last 0.25 (0.25 to 6); evaluation: 0.75 at step 2" in drawing
    assert 'class="legend"' in drawing


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 4, [-2, 0, 2, 4]), (0, 3, [0, 1, 2, 3])]
)
def test_linear_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert linear_ticks(low, high, 5) == wanted


def test_log_ticks_are_few_over_many_decades() -> None:
    assert log_ticks(-0.1, 1.1, 6) == pytest.approx([1, 2, 5, 10])
    assert log_ticks(-4.1, 0.1, 6) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert len(log_ticks(-30, 30, 6)) <= 7


def test_numbers_are_short() -> None:
    assert [short(value) for value in (12345.6, 0.12345, 2e-5, 3.0, math.nan)] == [
        "12,346",
        "0.123",
        "2e-5",
        "3",
        "nan",
    ]
    assert [tick_label(value) for value in (5000, 20000, 1.5e6, 0.05, 2e-5)] == ["5000", "20k", "1.5M", "0.05", "2e-5"]


HISTORY = [
    {"step": 1, "epoch": 0.1, "loss": 6.0, "grad_norm": 9.0, "learning_rate": 1e-5, "tokens_per_second": 900.0},
    {"step": 2, "loss": math.nan, "learning_rate": 2e-5, "learning_rate_vision": 1e-6, "learning_rate_language": 2e-5},
    {"step": 2, "eval_loss": 5.0, "eval_exact_match": 0.25, "eval_loss_blank": 5.5, "eval_loss_shown": 5.0, "epoch": 1},
    {"step": 2, "eval_runtime": 3.0, "eval_samples_per_second": 3.0, "eval_reward": -2.0, "router_entropy": 0.5},
    {"step": 2, "train_runtime": 9, "total_flos": 1e15, "train_loss": 3.0},
]


def test_each_figure_of_the_log_has_its_chart_and_new_ones_too() -> None:
    training = {chart.title: [line.name for line in chart.lines] for chart in training_charts(HISTORY)}
    assert training == {
        "Loss": ["training", "evaluation"],
        "Learning rate": ["vision", "language"],
        "Gradient norm": ["gradient norm"],
        "Tokens": ["all"],
        "router entropy": ["router entropy"],
    }
    evaluation = {chart.title: [line.name for line in chart.lines] for chart in evaluation_charts(HISTORY)}
    assert evaluation == {
        "Scores": ["exact match"],
        "reward": ["reward"],
        "Loss by image shown": ["its own", "blank"],
    }
    assert training_charts([]) == evaluation_charts([]) == []


def test_a_log_without_rates_of_parts_has_the_one_rate() -> None:
    (chart,) = training_charts([{"step": 3, "learning_rate": 1e-5}])
    assert chart.lines == (Line("all parts", ((3, 1e-5),)),)


def test_series_are_in_the_order_of_steps() -> None:
    assert series(
        [{"step": 2, "loss": "2.5"}, {"step": 1, "loss": 3}, {"loss": 1}, {"step": 3, "loss": "?"}], "loss"
    ) == (
        (1, 3.0),
        (2, 2.5),
    )


def test_a_hundred_thousand_lines_of_log_are_small_drawings() -> None:
    names = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "trained_tokens_per_second", "mfu")
    history = [
        {"step": step, **{name: 1 + math.sin(step * (1 + place)) for place, name in enumerate(names)}}
        for step in range(100_000)
    ]
    drawings = [draw(chart) for chart in training_charts(history)]
    assert len(drawings) == 5
    assert max(map(len, drawings)) < 25_000
