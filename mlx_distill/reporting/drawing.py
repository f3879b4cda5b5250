"""A chart drawn by matplotlib → SVG that belongs to the page around it.

In: `Curves` or a `Scatter`. Out: `<svg>` elements, one for each width at which the chart is to be
read; the style sheet shows the one that fits. Their text stays text in the page's font, and their
colours are the page's variables, so that a dark page has dark charts. Decided here: sizes, and
where a point's number goes.
"""

import io
import logging
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.reporting import ticks
from mlx_distill.reporting.charts import LOG_RATIO, Curves, Level, Point, Scatter, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = ((300, 220), (430, 236))  # pixels: on a phone, and as one of two beside each other
LARGE = ((300, 270), (560, 310), (880, 350))
POINTS = ((300, 340), (560, 360), (880, 376))  # numbers need room above and below them
LEFT, TOP, BOTTOM = 44, 8, 26  # pixels around the axes
ROLES = (
    *("accent", "teacher", "base", "compared", "prompt", "cot", "answer"),
    *("run-1", "run-2", "run-3", "run-4", "run-5", "run-6", "ink", "soft", "hair", "card"),
)
LOOK = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.parse_math": False,
    "lines.solid_capstyle": "round",
    "lines.scale_dashes": False,
}
DASHES = (0, (5, 4))
AROUND = [
    (round(radius * math.cos(turn * math.pi / 8)), round(radius * math.sin(turn * math.pi / 8)))
    for radius in (15, 22, 31, 42)
    for turn in range(16)
]


def drawings(chart: Curves | Scatter) -> list[str]:
    """The chart as SVG at each of its widths, the narrowest first."""
    sizes = POINTS if isinstance(chart, Scatter) else LARGE if chart.large else SMALL
    return [drawn(chart, width, height) for width, height in sizes]


@lru_cache(maxsize=64)  # a sweep writes its page again and again, most charts as before
def drawn(chart: Curves | Scatter, width: int, height: int) -> str:
    """The chart as one `<svg>` of `width` × `height` pixels, which a page may scale."""
    # Where matplotlib keeps its caches is nothing to tell a person who trains.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib  # half a second, and only a page needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)
        right = 10 if isinstance(chart, Curves) else 26
        inside = width - LEFT - right, height - TOP - BOTTOM
        place = LEFT / width, BOTTOM / height, inside[0] / width, inside[1] / height
        axes = figure.add_axes(place, frame_on=False)
        if isinstance(chart, Curves):
            _draw_curves(axes, chart, *inside)
        else:
            _draw_points(axes, chart, *inside)
        axes.minorticks_off()
        axes.tick_params(length=0, pad=9, labelcolor=_colour("soft"))
        axes.grid(axis="y", color=_colour("hair"), linewidth=1)
        for line in axes.get_ygridlines():
            line.set_clip_on(False)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return _for_a_page(text.getvalue(), width)


def _colour(role: str) -> str:
    """A colour that stands for a role until `_for_a_page` puts the page's variable in its place."""
    return f"#0000{ROLES.index(role) + 1:02x}"


def _variable(colour: re.Match) -> str:
    return f"var(--{ROLES[int(colour[1], 16) - 1]})"


def _for_a_page(svg: str, width: int) -> str:
    """matplotlib's SVG without what the page decides: header, ids, fonts, size, colours."""
    box = svg[svg.index('viewBox="') :].split('"')[1]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|</?g[^>]*>", "", body, flags=re.S)
    body = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"#0000([0-9a-f]{2})", _variable, body)
    body = re.sub(r'(?<=[\s"])(-?\d+\.\d\d)\d+(?=[\s"])', r"\1", body)  # not in the text of ticks
    return f'<svg class="w{width}" viewBox="{box}">' + re.sub(r"\s*\n\s*", " ", body).strip()


def _line(
    axes: "Axes", points: Sequence[tuple[float, float]], role: str, width: float, **look: Any
) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=_colour(role), linewidth=width, clip_on=False, **look)


def _disc(axes: "Axes", at: tuple[float, float], role: str, size: float, **look: Any) -> None:
    """A line of no length with round ends."""
    _line(axes, [at, at], role, size, **look)


# curves


def _draw_curves(axes: "Axes", chart: Curves, width: int, height: int) -> None:
    low, high = min(chart.ys), max(chart.ys)
    if chart.log:
        axes.set_yscale("log")
        marks = ticks.powers(low, high)
        axes.set_yticks(marks, [ticks.decade(mark) for mark in marks])
    else:
        marks = ticks.round_marks(0.0 if chart.from_zero and low >= 0 else low, high, 5)
        axes.set_yticks(marks, ticks.texts(marks, chart.shares))
    axes.set_ylim(marks[0], marks[-1])
    if chart.x_values:
        _axis_of_values(axes, chart, width)
    else:
        _axis_of_steps(axes, chart, width)
    for one in chart.series:
        _draw_bounds(axes, one)
    _draw_levels(axes, chart.levels)
    for one in chart.series:
        _draw_series(axes, one)


def _draw_bounds(axes: "Axes", one: Series) -> None:
    """A band; or a bar a point, where too few seeds stand behind it for a band between them."""
    if one.error_bars:
        for x, low, high in zip(one.x, one.low, one.high, strict=True):
            _line(axes, [(x, low), (x, high)], one.role, 2.2, alpha=0.45)
    elif one.low:
        band = [*one.x, *reversed(one.x)], [*one.low, *reversed(one.high)]
        axes.fill(*band, color=_colour(one.role), alpha=0.13, linewidth=0, clip_on=False)


def _draw_levels(axes: "Axes", levels: Sequence[Level]) -> None:
    for level in levels:
        across = [(x, level.y) for x in axes.get_xlim()]
        _line(axes, across, level.role, 1.4, linestyle=DASHES)


def _draw_series(axes: "Axes", one: Series) -> None:
    points = one.drawn
    if one.faint:
        _line(axes, points, one.role, 1, alpha=0.22)
        return
    style = DASHES if one.dashed else "solid"
    if one.faded:
        _line(axes, points, one.role, 1.2, linestyle=style, alpha=0.45)
        return
    width = 2.8 if one.bold else 2.4 if one.role == "accent" else 1.9
    _line(axes, points, one.role, width, linestyle=style)
    for dot in one.dots:
        _disc(axes, dot, one.role, 5, alpha=0.6)
    _disc(axes, points[-1], "card", 11)
    _disc(axes, points[-1], one.role, 7)


def _axis_of_steps(axes: "Axes", chart: Curves, width: int) -> None:
    xs = [x for one in chart.series for x, _ in one.known]
    low = min(xs) if min(xs) > 1 else 0.0
    high = max(*xs, low + max(1.0, low / 1000))
    marks = ticks.whole_numbers(low, high, width)
    axes.set_xticks(marks, [f"{x:,.0f}" for x in marks])
    axes.set_xlim(low, high)


def _axis_of_values(axes: "Axes", chart: Curves, width: int) -> None:
    """Ticks at the values; the axis starts at 0 where they come near it."""
    values = sorted({*chart.x_values, *(x for one in chart.series for x, _ in one.known)})
    low, high = values[0], values[-1]
    if low > 0 and high / low > LOG_RATIO:
        axes.set_xscale("log")
    elif 0 <= low <= high / 4:
        low = 0.0
    axes.set_xlim(low, high if high > low else low + (abs(low) or 1.0))
    said = [f"{x:g}".replace("e-0", "e-").replace("-", "−") for x in values]
    _show(axes, values, said, width)


def _show(axes: "Axes", marks: Sequence[float], said: Sequence[str], width: int) -> None:
    """Those ticks of x that have room."""
    shown = ticks.with_room([width * _share(axes, mark, 1.0)[0] for mark in marks], said)
    axes.set_xticks([marks[i] for i in shown], [said[i] for i in shown])


def _share(axes: "Axes", x: float, y: float) -> tuple[float, float]:
    """Where a point lies between the ends of the axes."""
    return tuple(axes.transLimits.transform(axes.transScale.transform((x, y))))


# points


def _draw_points(axes: "Axes", chart: Scatter, width: int, height: int) -> None:
    least, most = chart.points[0].x, chart.points[-1].x
    if chart.log:
        axes.set_xscale("log")
    marks = ticks.powers(least, most) if chart.log else ticks.round_marks(0.0, most, 4)
    axes.set_xlim(marks[0], marks[-1])
    _show(axes, marks, [chart.x_text(x) for x in marks], width)
    bounds = [y for point in chart.points for y in (point.low, point.high)]
    bounds += [level.y for level in chart.levels]
    marks = ticks.round_marks(min(bounds), max(bounds), 5)
    axes.set_yticks(marks, ticks.texts(marks, shares=True))
    axes.set_ylim(marks[0], marks[-1])
    _draw_levels(axes, chart.levels)
    for point in chart.points:
        _line(axes, [(point.x, point.low), (point.x, point.high)], point.role, 1.2, alpha=0.35)
    joined = [(point.x, point.y) for point in chart.points if point.joined]
    if joined:
        _line(axes, joined, "soft", 1.4)
    for point in chart.points:
        _disc(axes, (point.x, point.y), point.role, 9)
        if not point.joined:
            _disc(axes, (point.x, point.y), "card", 5)
    _number(axes, chart, width, height)


def _number(axes: "Axes", chart: Scatter, width: int, height: int) -> None:
    def places(points: Sequence[Point]) -> np.ndarray:
        shares = [_share(axes, point.x, point.y) for point in points]
        return np.reshape(shares, (-1, 2)) * (width, height)

    numbered = chart.with_number
    shifts = apart(places(numbered), width, height, places(chart.points))
    for i, (point, shift) in enumerate(zip(numbered, shifts, strict=True), 1):
        axes.annotate(
            str(i),
            (point.x, point.y),
            tuple(shift),
            textcoords="offset points",
            annotation_clip=False,
            ha="center",
            va="center",
            color=_colour("ink"),
            weight=700 if point.joined else 400,
        )


def apart(places: np.ndarray, width: float, height: float, points: np.ndarray) -> np.ndarray:
    """For each of `places` [N, 2] (pixels) how far from it its number goes: off all `points` and
    other numbers.

    Where no place around a point is free, its number takes the one that covers the fewest.
    """
    around = np.array(AROUND, float)
    far = np.hypot(*around.T)
    numbers = np.empty((len(places), 2))
    for i, place in enumerate(places):
        x, y = (at := place + around).T
        outside = (x < 6) + 0 + (x > width + 10) + (y < 6) + (y > height)
        covered = _near(at, points, 13, 12) + _near(at, numbers[:i], 18, 16) + outside
        numbers[i] = at[np.lexsort((far, covered))[0]]
    return numbers - places


def _near(at: np.ndarray, others: np.ndarray, width: float, height: float) -> np.ndarray:
    """How many of `others` [M, 2] are that near to each of `at` [A, 2]."""
    right, up = np.abs(at[:, None] - others).transpose(2, 0, 1)
    near: np.ndarray = ((right < width) & (up < height)).sum(1)
    return near
