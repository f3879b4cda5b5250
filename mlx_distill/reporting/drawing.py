"""A chart drawn by matplotlib → SVG that belongs to the page around it.

In: `Curves` or a `Scatter`. Out: `<svg>` elements, one for each width at which the chart is to be read; the style sheet
shows the one that fits. Their text stays text in the page's font, and their colours are the page's variables, so that a
dark page has dark charts. Decided here: sizes, ticks, and where a point's number goes.
"""

import io
import logging
import math
import re
from collections.abc import Sequence
from functools import lru_cache

from mlx_distill.reporting.charts import LOG_RATIO, Curves, Scatter, Series
from mlx_distill.words import decimals, number

SMALL = ((300, 220), (430, 236))  # pixels: on a phone, and as one of two beside each other
LARGE = ((300, 270), (560, 310), (880, 350))
POINTS = ((300, 340), (560, 360), (880, 376))  # numbers need room above and below them
LEFT, TOP, BOTTOM = 44, 8, 26  # pixels around the axes
GAP, LETTER = 6, 7  # pixels between the texts of two ticks, and of a letter
ROLES = (
    "accent",
    "teacher",
    "base",
    "compared",
    "prompt",
    "cot",
    "answer",
    "run-1",
    "run-2",
    "run-3",
    "run-4",
    "run-5",
    "run-6",
    "ink",
    "soft",
    "hair",
    "card",
)
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-distill",
    "font.size": 12,
    "axes.unicode_minus": True,
    "lines.solid_capstyle": "round",
    "lines.scale_dashes": False,
    "text.parse_math": False,
}
AROUND = [
    (round(radius * math.cos(turn * math.pi / 8)), round(radius * math.sin(turn * math.pi / 8)))
    for radius in (15, 22, 31, 42)
    for turn in range(16)
]


def drawings(chart: Curves | Scatter) -> list[str]:
    """The chart as SVG at each of its widths, the narrowest first."""
    sizes = POINTS if isinstance(chart, Scatter) else LARGE if chart.large else SMALL
    return [drawn(chart, width, height) for width, height in sizes]


@lru_cache(
    maxsize=64
)  # a sweep writes its page again after each run, and most of its charts are as before
def drawn(chart: Curves | Scatter, width: int, height: int) -> str:
    """The chart as one `<svg>` of `width` × `height` pixels, which a page may scale."""
    logging.getLogger("matplotlib").setLevel(
        logging.ERROR
    )  # where its caches are is nothing to tell a person who trains
    import matplotlib  # half a second, and only a page needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)
        draw, right = (_draw_curves, 10) if isinstance(chart, Curves) else (_draw_scatter, 26)
        inside = width - LEFT - right, height - TOP - BOTTOM
        place = LEFT / width, BOTTOM / height, inside[0] / width, inside[1] / height
        axes = figure.add_axes(place, frame_on=False)
        draw(axes, chart, *inside)
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


def _for_a_page(svg: str, width: int) -> str:
    """matplotlib's SVG without what a page forbids or decides itself: header, ids, fonts, sizes, colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>", "", svg, flags=re.S)
    svg = re.sub(
        r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", rf'<svg class="w{width}" \1>', svg, count=1
    )
    svg = re.sub(r"</?g[^>]*>| ?font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda match: f"var(--{ROLES[int(match[1], 16) - 1]})", svg)
    svg = re.sub(
        r"(?<=[\s\"])(-?\d+\.\d\d)\d+(?=[\s\"])", r"\1", svg
    )  # of places, not of the text of ticks
    return re.sub(r"\s*\n\s*", " ", svg).strip()


# curves


def _draw_curves(axes, chart: Curves, width: int, height: int) -> None:
    ys = chart.ys
    if chart.log:
        axes.set_yscale("log")
        marks = _powers(min(ys), max(ys))
    else:
        marks = _round(0.0 if chart.from_zero and min(ys) >= 0 else min(ys), max(ys), 5)
    gap = marks[1] - marks[0]
    places = decimals(100 * gap) if chart.shares else None if chart.log else decimals(gap)
    axes.set_yticks(marks, [number(y, chart.shares, places) for y in marks])
    axes.set_ylim(marks[0], marks[-1])
    _x_axis(axes, chart, width)
    for one in chart.series:
        if one.low:
            band = [*one.x, *reversed(one.x)], [*one.low, *reversed(one.high)]
            axes.fill(*band, color=_colour(one.role), alpha=0.13, linewidth=0, clip_on=False)
    for level in chart.levels:
        axes.plot(
            axes.get_xlim(),
            [level.y] * 2,
            color=_colour(level.role),
            linewidth=1.4,
            linestyle=(0, (5, 4)),
            clip_on=False,
        )
    for one in chart.series:
        _draw_series(axes, one)


def _draw_series(axes, one: Series) -> None:
    points = one.drawn
    look = (
        {"linewidth": 1, "alpha": 0.22}
        if one.faint
        else {"linewidth": 2.4 if one.role == "accent" else 1.9}
    )
    style = (0, (5, 4)) if one.dashed else "solid"
    axes.plot(
        *zip(*points, strict=True), color=_colour(one.role), linestyle=style, clip_on=False, **look
    )
    for dot in one.dots:
        _dot(axes, dot, 5, one.role, alpha=0.6)
    if not one.faint:
        _dot(axes, points[-1], 11, "card")
        _dot(axes, points[-1], 7, one.role)


def _dot(axes, at: tuple[float, float], size: float, role: str, **look) -> None:
    """A disc: a line of no length with round ends."""
    axes.plot([at[0]] * 2, [at[1]] * 2, color=_colour(role), linewidth=size, clip_on=False, **look)


def _x_axis(axes, chart: Curves, width: int) -> None:
    xs = [x for one in chart.series for x, _ in one.known]
    if not chart.x_values:
        low = min(xs) if min(xs) > 1 else 0.0
        high = max(*xs, low + 1)
        most = min(6, int(width / (2 * GAP + LETTER * len(f"{high:,.0f}"))))
        marks = [x for x in _round(low, high, most) if low <= x <= high and x == int(x)]
        axes.set_xticks(marks, [f"{x:,.0f}" for x in marks])
    else:
        values = sorted({*chart.x_values, *xs})
        low, high = values[0], values[-1]
        if low > 0 and high / low > LOG_RATIO:
            axes.set_xscale("log")
        elif 0 <= low <= high / 4:
            low = 0.0
        high = high if high > low else low + (abs(low) or 1.0)
        axes.set_xlim(low, high)
        _ticks_with_room(axes, values, [_short(x) for x in values], width)
    axes.set_xlim(low, high)


def _short(x: float) -> str:
    return f"{x:g}".replace("e-0", "e-").replace("-", "−")


def _ticks_with_room(axes, values: Sequence[float], texts: Sequence[str], width: int) -> None:
    """Ticks of x where their text fits: at the last value, and at those that leave those before and the last one room."""
    room = GAP + LETTER * max(map(len, texts))
    places = [
        width * axes.transLimits.transform(axes.transScale.transform((x, 1.0)))[0] for x in values
    ]
    kept: list[int] = []
    for i, place in enumerate(places[:-1]):
        if places[-1] - place >= room and (not kept or place - places[kept[-1]] >= room):
            kept.append(i)
    kept.append(len(values) - 1)
    axes.set_xticks([values[i] for i in kept], [texts[i] for i in kept])


def _round(low: float, high: float, most: int) -> list[float]:
    """Steps of 1, 2 or 5 times a power of ten that cover [low, high] in about `most` intervals at most."""
    from matplotlib.ticker import MaxNLocator

    if high == low:
        high = low + (abs(low) or 1.0)
    marks = MaxNLocator(most, steps=(1, 2, 5, 10)).tick_values(low, high)
    return _around([round(mark, 12) for mark in marks.tolist()], low, high)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with the 2s and 5s between them where there are few."""
    from matplotlib.ticker import LogLocator

    fine = _around(LogLocator(subs=(1, 2, 5)).tick_values(low, high), low, high)
    return (
        fine
        if 2 <= len(fine) <= 6
        else _around(LogLocator(numticks=7).tick_values(low, high), low, high)
    )


def _around(marks: Sequence[float], low: float, high: float) -> list[float]:
    """Of ascending marks those in [low, high], and the next on either side where an end is not one."""
    marks = [float(mark) for mark in marks]
    if not marks:
        return []
    first = max((mark for mark in marks if mark <= low), default=marks[0])
    last = min((mark for mark in marks if mark >= high and mark > first), default=marks[-1])
    return [mark for mark in marks if first <= mark <= last]


# points


def _draw_scatter(axes, chart: Scatter, width: int, height: int) -> None:
    least, most = chart.points[0].x, chart.points[-1].x
    if chart.log:
        axes.set_xscale("log")
        x_marks = _powers(least, most)
    else:
        x_marks = _round(0.0, most, 4)
    y_marks = _round(
        min(point.low for point in chart.points), max(point.high for point in chart.points), 5
    )
    axes.set_xlim(x_marks[0], x_marks[-1])
    axes.set_ylim(y_marks[0], y_marks[-1])
    _ticks_with_room(axes, x_marks, [chart.x_text(x) for x in x_marks], width)
    places = decimals(100 * (y_marks[1] - y_marks[0]))
    axes.set_yticks(y_marks, [number(y, percent=True, places=places) for y in y_marks])
    for point in chart.points:
        axes.plot(
            [point.x] * 2,
            [point.low, point.high],
            color=_colour(point.role),
            linewidth=1.2,
            alpha=0.35,
            clip_on=False,
        )
    joined = [(point.x, point.y) for point in chart.points if point.joined]
    if joined:
        axes.plot(*zip(*joined, strict=True), color=_colour("soft"), linewidth=1.4, clip_on=False)
    for point in chart.points:
        _dot(axes, (point.x, point.y), 9, point.role)
        if not point.joined:
            _dot(axes, (point.x, point.y), 5, "card")
    _number(axes, chart, width, height)


def _number(axes, chart: Scatter, width: int, height: int) -> None:
    shares = [
        axes.transLimits.transform(axes.transScale.transform((point.x, point.y)))
        for point in chart.points
    ]
    shifts = apart([(x * width, y * height) for x, y in shares], width, height)
    for i, (point, shift) in enumerate(zip(chart.points, shifts, strict=True)):
        axes.annotate(
            str(i + 1),
            (point.x, point.y),
            shift,
            textcoords="offset points",
            ha="center",
            va="center",
            color=_colour("ink"),
            fontweight="bold" if point.joined else "normal",
            annotation_clip=False,
        )


def apart(
    places: Sequence[tuple[float, float]], width: float, height: float
) -> list[tuple[float, float]]:
    """For each of `places` (pixels) how far from it its number goes, so that numbers cover no point and no number.

    Where no place around a point is free, its number takes the one that covers the fewest.
    """
    numbers: list[tuple[float, float]] = []
    shifts = []
    for x, y in places:

        def covered(shift: tuple[float, float], x=x, y=y) -> tuple[int, float]:
            at = x + shift[0], y + shift[1]
            points = sum(abs(at[0] - a) < 13 and abs(at[1] - b) < 12 for a, b in places)
            others = sum(abs(at[0] - a) < 18 and abs(at[1] - b) < 16 for a, b in numbers)
            outside = (at[0] < 6) + (at[0] > width + 10) + (at[1] < 6) + (at[1] > height)
            return points + others + outside, math.hypot(*shift)

        shifts.append(min(AROUND, key=covered))
        numbers.append((x + shifts[-1][0], y + shifts[-1][1]))
    return shifts
