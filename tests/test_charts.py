"""Charts: where ticks and points fall, and that a series is drawn as it is."""

import math

import pytest

from mlx_distill.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTHS,
    Level,
    Point,
    Series,
    apart,
    line_chart,
    log_ticks,
    scatter,
    smoothed,
    thinned,
    ticks,
)
from mlx_distill.words import number


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 1.93, 5) == [0, 0.5, 1.0, 1.5, 2.0]
    assert ticks(0, 500, 6) == [0, 100, 200, 300, 400, 500]
    assert ticks(0.2, 0.97, 5) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(ticks(3, 3, 5)) > 1


@pytest.mark.parametrize(("low", "high"), [(0.01, 2), (0.03, 1.4), (1e-4, 10), (0.5, 30), (1, 1)])
def test_logarithmic_ticks_cover_the_range(low, high):
    marks = log_ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and marks == sorted(set(marks)) and 2 <= len(marks) <= 8


def test_a_point_falls_where_its_value_says():
    chart = line_chart("loss", "nats", [Series("a", "accent", [0, 5, 10], [2.0, 1.0, 0.0])])
    assert chart.lines[0].points == "0.00,0.00 50.00,50.00 100.00,100.00"
    assert (chart.lines[0].first, chart.lines[0].last) == ("2.00", "0")
    assert not chart.log


def test_gaps_and_nan_leave_no_point():
    chart = line_chart("loss", "nats", [Series("a", "accent", [0, 1, 2, 3], [1.0, None, math.nan, 0.5]), Series("b", "cot", [0], [None])])
    assert len(chart.lines) == 1 and len(chart.lines[0].points.split()) == 2
    assert line_chart("loss", "nats", [Series("a", "accent", [0], [math.inf])]) is None


def test_a_wide_positive_series_is_logarithmic():
    assert line_chart("kl", "nats", [Series("a", "accent", [0, 1], [4.0, 0.01])]).log
    assert not line_chart("agree", "share", [Series("a", "accent", [0, 1], [0.9, 0.01])], percent=True).log


def test_thinning_keeps_ends_and_mean():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1 and few[0] == points[0] and few[-1] == points[-1]
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.05)


def test_smoothing_is_a_centred_mean_of_what_is_known():
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]
    values = [float(i) for i in range(80)]
    assert smoothed(values)[40] == 40.0
    assert smoothed([*values[:40], math.nan, *values[41:]])[40] == 40.0


def test_numbers():
    assert [number(value) for value in (0, 0.4123, 12.3, 1234.5, 0.00012, -0.5)] == ["0", "0.412", "12.3", "1,234", "1.2e−4", "−0.500"]
    assert number(0.7123, percent=True) == "71.2\u00a0%"


def test_bands_dots_and_levels_fall_where_their_values_say():
    series = Series("a", "run-1", [0.5, 1.0], [0.4, 0.6], low=[0.2, 0.5], high=[0.5, 1.0], dots=[(0.5, 0.3)])
    chart = line_chart("accuracy", "share", [series], percent=True, x_name="f", x_values=[0.5, 1.0], levels=[Level("base", "base", 0.0)])
    line = chart.lines[0]
    assert line.points == "0.00,60.00 100.00,40.00"
    assert line.band == "0.00,80.00 100.00,50.00 100.00,0.00 0.00,50.00"
    assert line.dots == [(0.0, pytest.approx(70.0))]
    assert [(one.label, one.place, one.text) for one in chart.references] == [("base", 100.0, "0.0\u00a0%")]


def test_an_axis_of_values_has_its_ticks_at_them():
    def texts(values):
        chart = line_chart("a", "b", [Series("a", "run-1", values, values)], x_values=values)
        return [(tick.text, round(tick.place)) for tick in chart.x_ticks]

    assert texts([0.1, 0.5, 1.0]) == [("0.1", 10), ("0.5", 50), ("1", 100)]
    assert texts([0.5, 0.51, 0.75, 0.99, 1.0]) == [("0.5", 0), ("0.75", 50), ("1", 100)]
    assert texts([1e-5, 1e-4, 1e-3]) == [("1e−5", 0), ("0.0001", 50), ("0.001", 100)]
    assert texts([3.0]) == [("3", 0)]


def test_narrow_shares_have_ticks_that_differ():
    chart = line_chart("a", "b", [Series("a", "run-1", [0, 1], [0.701, 0.709])], percent=True, from_zero=False)
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks) > 2


def test_a_scatter_is_numbered_by_x_and_joined_through_the_front():
    points = [Point(name, "run-1", x, y, y - 0.1, y + 0.1, joined) for name, x, y, joined in
              (("b", 4.0, 0.5, False), ("a", 1.0, 0.6, True), ("c", 8.0, 0.9, True))]
    chart = scatter("t", "u", points, "cost", "{:g}".format)
    assert [(mark.number, mark.point.label) for mark in chart.marks] == [(1, "a"), (2, "b"), (3, "c")]
    assert [mark.place[0] for mark in chart.marks] == [12.5, 50.0, 100.0] and not chart.log
    assert chart.line == " ".join(f"{mark.place[0]:.2f},{mark.place[1]:.2f}" for mark in chart.marks if mark.point.joined)
    assert all(mark.high < mark.place[1] < mark.low for mark in chart.marks)
    wide = scatter("t", "u", [*points, Point("d", "run-1", 400.0, 0.7, 0.6, 0.8, False)], "cost", "{:g}".format)
    assert wide.log and all(0 <= mark.place[0] <= 100 for mark in wide.marks)
    assert scatter("t", "u", [], "cost", str) is None


def test_numbers_keep_off_points_and_each_other():
    places = [(50.0 + 3 * math.cos(i), 50.0 + 3 * math.sin(i)) for i in range(6)] + [(0.0, 0.0), (100.0, 0.0), (100.0, 100.0)]
    shifts = apart(places)
    for width in WIDTHS:
        pixels = [(x * width / 100, y * HEIGHT / 100) for x, y in places]
        middles = [(x + a, y + b) for (x, y), (a, b) in zip(pixels, shifts, strict=True)]
        assert all(abs(a - c) >= 18 or abs(b - d) >= 16 for i, (a, b) in enumerate(middles) for c, d in middles[:i])
        assert all(abs(a - c) >= 13 or abs(b - d) >= 12 for a, b in middles for c, d in pixels)
