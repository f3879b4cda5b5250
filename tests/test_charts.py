"""Charts: where ticks and points fall, and that a series is drawn as it is."""

import math

import pytest

from mlx_distill.charts import MOST_POINTS, Series, line_chart, log_ticks, number, smoothed, thinned, ticks


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
