"""Charts: where ticks, points and bands fall, read back from the SVG that a page holds."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from drawn import Drawn

from mlx_distill.reporting.charts import (
    MOST_NUMBERS,
    MOST_POINTS,
    Level,
    Point,
    Series,
    line_chart,
    scatter,
    smoothed,
    thinned,
)
from mlx_distill.reporting.drawing import apart, drawings
from mlx_distill.words import number


def chart(x, y, **more):
    return line_chart("loss", "nats", [Series("a", "accent", tuple(x), tuple(y))], **more)


def drawn(one):
    """A chart at its widest."""
    return Drawn(drawings(one)[-1])


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1.93, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (0, 500, ["0", "100", "200", "300", "400", "500"]),
        (-0.2, 0.97, ["−0.5", "0.0", "0.5", "1.0"]),
        (3, 3, ["0", "1", "2", "3"]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, texts):
    assert drawn(chart([0, 1], [low, high])).y_ticks == texts


@pytest.mark.parametrize(
    ("low", "high"), [(0.01, 2), (0.03, 1.4), (1e-4, 10), (0.5, 30), (1e-12, 1e6)]
)
def test_logarithmic_ticks_cover_the_range(low, high):
    one = drawn(chart([0, 1], [low, high]))
    assert 2 <= len(one.y_ticks) <= 8 and one.grid == sorted(one.grid, reverse=True)
    ((_, _, points),) = one.lines
    assert all(one.grid[-1] - 0.01 <= y <= one.grid[0] + 0.01 for _, y in points)


def test_a_point_falls_where_its_value_says():
    one = chart([0, 5, 10], [2.0, 1.0, 0.5])
    for svg in drawings(one):
        read = Drawn(svg)
        ((role, dashed, points),) = read.lines
        assert (role, dashed) == ("accent", False)
        assert read.points(points) == [
            pytest.approx(point, abs=0.01) for point in ((0, 2.0), (5, 1.0), (10, 0.5))
        ]
        assert read.discs == [("card", points[-1]), ("accent", points[-1])]
    assert [(key.first, key.last) for key in one.key] == [("2.00", "0.500")]
    assert not one.log


def test_gaps_and_nan_leave_no_point():
    series = [
        Series("a", "accent", (0, 1, 2, 3), (1.0, None, math.nan, 0.5)),
        Series("b", "cot", (0,), (None,)),
    ]
    one = line_chart("loss", "nats", series)
    assert [len(points) for _, _, points in drawn(one).lines] == [2]
    assert line_chart("loss", "nats", [Series("a", "accent", (0,), (math.inf,))]) is None


def test_a_single_point_is_a_disc():
    one = drawn(chart([3], [0.5]))
    assert one.lines == [] or all(points[0] == points[-1] for _, _, points in one.lines)
    assert ("accent" in dict(one.discs)) and one.points([dict(one.discs)["accent"]])[
        0
    ] == pytest.approx((3, 0.5), abs=0.01)


def test_a_wide_positive_series_is_logarithmic():
    assert chart([0, 1], [4.0, 0.01]).log
    assert not chart([0, 1], [0.9, 0.01], shares=True).log


@pytest.mark.parametrize(
    "values",
    [
        (1e308, -1e308, 0.5),
        (5e-324, 1.0),
        (1e-300, 0.0),
        (10**400, 3),
        (1e16,),
        (1e-13, 3e-13),
        (-0.0,),
    ],
)
def test_no_number_of_a_log_stops_a_page(values):
    for steps in (range(len(values)), values):
        one = chart(steps, values)
        for read in map(Drawn, drawings(one) if one else ()):
            assert len(set(read.y_ticks)) == len(read.y_ticks) > 1
            assert all(-1 <= y <= read.height for _, _, points in read.lines for _, y in points)


def test_thinning_keeps_ends_and_mean():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1 and few[0] == points[0] and few[-1] == points[-1]
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.05)


def test_smoothing_is_a_centred_mean_of_what_is_known():
    assert smoothed([1.0, 2.0]) == (1.0, 2.0)
    values = [float(i) for i in range(80)]
    assert smoothed(values)[40] == 40.0
    assert smoothed([*values[:40], math.nan, *values[41:]])[40] == 40.0


def test_numbers():
    assert [number(value) for value in (0, 0.4123, 12.3, 1234.5, 0.00012, -0.5)] == [
        "0",
        "0.412",
        "12.3",
        "1,234",
        "1.2e−4",
        "−0.500",
    ]
    assert number(0.7123, percent=True) == "71.2\u00a0%"


def test_bands_dots_and_levels_fall_where_their_values_say():
    series = Series(
        "a",
        "run-1",
        (0.5, 1.0),
        (0.4, 0.6),
        low=(0.2, 0.5),
        high=(0.5, 1.0),
        dots=((0.5, 0.3),),
        dashed=True,
    )
    levels = (Level("base", "base", 0.1),)
    one = line_chart(
        "accuracy", "share", [series], shares=True, x_name="f", x_values=(0.5, 1.0), levels=levels
    )
    read = drawn(one)
    ((_, band),) = read.bands
    assert read.points(band) == [
        pytest.approx(point, abs=2e-3) for point in ((0.5, 0.2), (1.0, 0.5), (1.0, 1.0), (0.5, 0.5))
    ]
    lines = {
        role: (dashed, [y for _, y in read.points(points)]) for role, dashed, points in read.lines
    }
    assert lines["base"] == (True, pytest.approx([0.1, 0.1], abs=2e-3))
    assert lines["run-1"] == (True, pytest.approx([0.4, 0.6], abs=2e-3))
    assert read.points([point for role, point in read.discs if role == "run-1"])[
        0
    ] == pytest.approx((0.5, 0.3), abs=2e-3)
    assert [(key.label, key.first, key.last) for key in one.key] == [
        ("a", "40.0\u00a0%", "60.0\u00a0%"),
        ("base", "", "10.0\u00a0%"),
    ]


def test_an_axis_of_values_has_its_ticks_at_them():
    def texts(values):
        read = drawn(line_chart("a", "b", [Series("a", "run-1", values, values)], x_values=values))
        return [text for _, text in read.x_ticks]

    assert texts((0.1, 0.5, 1.0)) == ["0.1", "0.5", "1"]
    assert texts((0.5, 0.51, 0.75, 0.99, 1.0)) == ["0.5", "0.75", "1"]
    assert texts((1e-5, 1e-4, 1e-3)) == ["1e−5", "0.0001", "0.001"]
    assert texts((3.0,)) == ["3"]


def test_ticks_have_room_at_every_width():
    steps = tuple(range(0, 120_001, 500))
    series = Series("a", "accent", steps, steps)
    for one in (
        line_chart("a", "b", [series]),
        line_chart("a", "b", [series], x_values=tuple(range(0, 120_001, 10_000)), large=True),
    ):
        for svg in drawings(one):
            ticks = Drawn(svg).x_ticks
            for (place, text), (next_place, next_text) in pairwise(ticks):
                assert next_place - place > 6.6 * (len(text) + len(next_text)) / 2, ticks


def test_narrow_shares_have_ticks_that_differ():
    one = chart([0, 1], [0.701, 0.709], shares=True, from_zero=False)
    texts = drawn(one).y_ticks
    assert len(set(texts)) == len(texts) > 2


def test_a_scatter_is_numbered_by_x_and_joined_through_the_front():
    points = [
        Point(name, "run-1", x, y, y - 0.1, y + 0.1, joined)
        for name, x, y, joined in (
            ("b", 4.0, 0.5, False),
            ("a", 1.0, 0.6, True),
            ("c", 8.0, 0.9, True),
        )
    ]
    one = scatter("t", "u", points, "cost", "{:g}".format)
    assert [(number, label, joined) for number, label, _, joined in one.numbered] == [
        (1, "a", True),
        (2, "b", False),
        (3, "c", True),
    ]
    read = drawn(one)
    assert [text for _, _, text in read.numbers] == ["1", "2", "3"] and not one.log
    front = next(points for role, _, points in read.lines if role == "soft")
    assert read.points(front) == [pytest.approx(point, abs=5e-3) for point in ((1, 0.6), (8, 0.9))]
    whiskers = [read.points(points) for role, _, points in read.lines if role == "run-1"]
    assert whiskers[1] == [pytest.approx((4, 0.4), abs=5e-3), pytest.approx((4, 0.6), abs=5e-3)]
    assert [role for role, _ in read.discs] == [
        "run-1",
        "run-1",
        "card",
        "run-1",
    ]  # the one off the front is a ring
    wide = scatter(
        "t", "u", [*points, Point("d", "run-1", 400.0, 0.7, 0.6, 0.8, False)], "cost", "{:g}".format
    )
    assert wide.log and all(44 <= x <= 880 for _, (x, _) in drawn(wide).discs)
    assert scatter("t", "u", [], "cost", str) is None


def test_of_very_many_points_those_on_the_line_are_numbered():
    def made(count: int):
        points = [
            Point(str(i), "run-1", 1.0 + i, 0.2 + i / 1000, 0.1, 0.9, i % 40 == 0)
            for i in range(count)
        ]
        return scatter("t", "u", points, "cost", "{:g}".format)

    few, many = made(MOST_NUMBERS), made(MOST_NUMBERS + 1)
    assert len(few.numbered) == MOST_NUMBERS and few.subtitle == "u"
    assert [number[:2] for number in many.numbered] == [(1, "0"), (2, "40"), (3, "80")]
    assert many.subtitle == "u; numbered are those that are joined"
    read = drawn(many)
    assert [text for _, _, text in read.numbers] == ["1", "2", "3"]
    rings = sum(role == "card" for role, _ in read.discs)
    assert rings == MOST_NUMBERS + 1 - 3  # all points are drawn


def test_numbers_keep_off_points_and_each_other():
    for width, height in ((230, 300), (810, 330)):
        places = [(width / 2 + 9 * math.cos(i), height / 2 + 11 * math.sin(i)) for i in range(6)]
        places += [(0.0, 0.0), (width, 0.0), (width, height)]
        at = np.array(places)
        middles = (at + apart(at, width, height, at)).tolist()
        assert all(
            abs(a - c) >= 18 or abs(b - d) >= 16
            for i, (a, b) in enumerate(middles)
            for c, d in middles[:i]
        )
        assert all(abs(a - c) >= 13 or abs(b - d) >= 12 for a, b in middles for c, d in places)


def test_a_drawing_belongs_to_its_page(monkeypatch, tmp_path):
    """No colour, font, name or address of its own, whatever a person's matplotlib is set to."""
    import matplotlib

    one = line_chart(
        "loss",
        "nats",
        [Series("a", "accent", (0, 1), (0.12345, 0.5), low=(0.1, 0.4), high=(0.2, 0.6))],
    )
    before = drawings(one)
    for svg in before:
        assert re.fullmatch(r'<svg class="w\d+" viewBox="[\d. ]+">.*</svg>', svg)
        assert not re.search(
            r"#|url|http|href|xmlns|font-family| id=|<(?!/?(svg|path|text)\b)", svg
        )
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "axes.grid": True, "svg.fonttype": "path"}
    ):
        from mlx_distill.reporting.drawing import drawn as draw

        draw.cache_clear()
        assert drawings(one) == before
        assert matplotlib.rcParams["font.size"] == 30
