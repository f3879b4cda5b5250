"""Curves and bars as positions in per cent, ready for a template to draw at any width.

In: series of numbers. Out: `Chart`s whose lines live in a 100 × 100 box and whose ticks know their place and their text.
Decided here: round ticks, when an axis is logarithmic, how many points are drawn. Nothing here knows HTML or colours.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_distill.words import decimals, finite, is_number, number

MOST_POINTS = 300
TICK_ROOM = 5.5  # per cent of an axis that the text of a tick takes
WIDTHS, HEIGHT = (270, 420, 640, 880), 340  # pixels of a scatter's box, on a phone and on a desk
AROUND = [(round(r * math.cos(a * math.pi / 8)), round(-r * math.sin(a * math.pi / 8))) for r in (15, 22, 31, 42) for a in range(16)]
LOG_RATIO = 40.0  # a positive series that spans more than this reads better on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One curve before it is drawn; `role` names its look in the style sheet, `faint` draws it behind the others.

    low, high: the bounds of its y, finite, drawn as a band where given. dots: (x, y) of what its points are the means of.
    """

    label: str
    role: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: Sequence[tuple[float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Level:
    """A y value to draw across the whole chart."""

    label: str
    role: str
    y: float


@dataclass(frozen=True)
class Tick:
    """A mark at `place` per cent of an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve as SVG `points` in a 100 × 100 box (y grows downwards), with its first and last value as text.

    band: the points of the polygon between low and high, "" without them. single: whether the curve is one point.
    """

    label: str
    role: str
    points: str
    first: str
    last: str
    end: tuple[float, float]
    faint: bool
    band: str
    dots: list[tuple[float, float]]
    dashed: bool
    single: bool


@dataclass(frozen=True)
class Reference:
    """A horizontal line at `place` per cent from the top."""

    label: str
    role: str
    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    log: bool
    x_name: str
    references: list[Reference]


@dataclass(frozen=True)
class Point:
    """One point of a scatter before it is drawn: y with what it may as well be; `joined` points lie on the scatter's line."""

    label: str
    role: str
    x: float
    y: float
    low: float
    high: float
    joined: bool


@dataclass(frozen=True)
class Mark:
    """A point at `place` per cent from the left and the top, its number `shift` pixels from it; low and high are per cent too."""

    number: int
    point: Point
    place: tuple[float, float]
    low: float
    high: float
    shift: tuple[float, float]


@dataclass(frozen=True)
class Scatter:
    """Numbered points, and a line through those that are joined, in a box `HEIGHT` pixels high."""

    title: str
    unit: str
    x_name: str
    marks: list[Mark]
    line: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    log: bool


@dataclass(frozen=True)
class Scale:
    """Values to shares of an axis, 0 at `low` and 1 at `high`."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        warp = math.log if self.log else float
        return (warp(value) - warp(self.low)) / (warp(self.high) - warp(self.low))


def line_chart(
    title: str, unit: str, series: Sequence[Series], percent: bool = False,
    x_name: str = "step", x_values: Sequence[float] = (), levels: Sequence[Level] = (), from_zero: bool = True,
) -> Chart | None:
    """A chart of `series` over a shared x axis; None where no series has a finite point.

    x_values: where to put the ticks of x, as far as they leave each other room; without them x counts steps. from_zero: whether
    the y axis of positive values starts at 0.
    """
    drawn = [(one, points) for one in series if (points := thinned(finite(one.x, one.y)))]
    if not drawn:
        return None
    ys = [y for one, points in drawn for y in [*(y for _, y in [*points, *one.dots]), *one.low, *one.high]]
    ys += [level.y for level in levels]
    log = not percent and min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    y_marks = log_ticks(min(ys), max(ys)) if log else ticks(0.0 if from_zero and min(ys) >= 0 else min(ys), max(ys), 5)
    y_scale = Scale(min(y_marks), max(y_marks), log)
    xs = [x for _, points in drawn for x, _ in points]
    x_scale, x_ticks = _values(sorted({*x_values, *xs})) if x_values else _steps(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * x_scale.place(x), 100 * (1 - y_scale.place(y))

    def line(one: Series, points: list[tuple[float, float]]) -> Line:
        placed = [place(*point) for point in points]
        known = finite(one.x, one.y)
        band = [*zip(one.x, one.low, strict=True), *reversed([*zip(one.x, one.high, strict=True)])] if one.low else []
        return Line(
            one.label, one.role, svg_points(placed), number(known[0][1], percent), number(known[-1][1], percent), placed[-1], one.faint,
            svg_points(place(*point) for point in band), [place(*dot) for dot in one.dots], one.dashed, len(known) == 1,
        )

    gap = y_marks[1] - y_marks[0]
    places = decimals(100 * gap) if percent else None if log else decimals(gap)
    return Chart(
        title, unit, [line(one, points) for one, points in drawn], x_ticks,
        [Tick(100 * (1 - y_scale.place(y)), number(y, percent, places)) for y in y_marks],
        log, x_name, [Reference(one.label, one.role, 100 * (1 - y_scale.place(one.y)), number(one.y, percent)) for one in levels],
    )


def svg_points(placed: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in placed)


def _steps(xs: Sequence[float]) -> tuple[Scale, list[Tick]]:
    """An axis of whole numbers."""
    low = min(xs) if min(xs) > 1 else 0.0
    scale = Scale(low, max(max(xs), low + 1))
    marks = [mark for mark in ticks(scale.low, scale.high, 6) if scale.low <= mark <= scale.high and mark == int(mark)]
    return scale, [Tick(100 * scale.place(x), f"{x:,.0f}") for x in marks]


def _values(values: Sequence[float]) -> tuple[Scale, list[Tick]]:
    """An axis with a tick at each of the ascending `values`, but for those that a tick before them or the last leaves no room.

    It starts at 0 where the values come near it, and is logarithmic where they span more than `LOG_RATIO`.
    """
    low, high = values[0], values[-1]
    log = low > 0 and high / low > LOG_RATIO
    scale = Scale(0.0 if not log and 0 <= low <= high / 4 else low, high if high > low else low + (abs(low) or 1.0), log)
    places = [(100 * scale.place(value), value) for value in values]
    kept: list[tuple[float, float]] = []
    for place, value in places:
        if value == high or ((not kept or place - kept[-1][0] >= TICK_ROOM) and places[-1][0] - place >= TICK_ROOM):
            kept.append((place, value))
    return scale, [Tick(place, f"{value:g}".replace("e-0", "e-").replace("-", "−")) for place, value in kept]


def scatter(title: str, unit: str, points: Sequence[Point], x_name: str, x_text: Callable[[float], str]) -> Scatter | None:
    """A scatter of shares y in [0, 1] over positive x, numbered from the smallest x on; None where there is no point.

    x_text: what a tick of x says.
    """
    ordered = sorted(points, key=lambda point: (point.x, point.y))
    if not ordered:
        return None
    least, most = ordered[0].x, ordered[-1].x
    log = most / least > LOG_RATIO
    x_marks = log_ticks(least, most) if log else ticks(0.0, most, 4)
    y_marks = ticks(min(point.low for point in ordered), max(point.high for point in ordered), 5)
    x_scale, y_scale = Scale(x_marks[0], x_marks[-1], log), Scale(y_marks[0], y_marks[-1])
    places = [(100 * x_scale.place(point.x), 100 * (1 - y_scale.place(point.y))) for point in ordered]
    shifts = apart(places)
    marks = [
        Mark(i + 1, point, places[i], 100 * (1 - y_scale.place(point.low)), 100 * (1 - y_scale.place(point.high)), shifts[i])
        for i, point in enumerate(ordered)
    ]
    places_of_y = decimals(100 * (y_marks[1] - y_marks[0]))
    return Scatter(
        title, unit, x_name, marks, svg_points(mark.place for mark in marks if mark.point.joined),
        [Tick(100 * x_scale.place(x), x_text(x)) for x in x_marks],
        [Tick(100 * (1 - y_scale.place(y)), number(y, True, places_of_y)) for y in y_marks], log,
    )


def apart(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """For each of `places` (per cent) how many pixels from it its number goes, so that numbers cover no point and no number.

    It holds at each of `WIDTHS`; where no place around a point is free, its number takes the one that covers the fewest.
    """
    set_: list[tuple[float, float]] = []
    for i in range(len(places)):
        set_.append(min(AROUND, key=lambda shift: (_covered(places, set_, i, shift), math.hypot(*shift))))
    return set_


def _covered(places: Sequence[tuple[float, float]], taken: Sequence[tuple[float, float]], i: int, shift: tuple[float, float]) -> int:
    """How many points and earlier numbers (and edges) the number of place `i` would lie on at the worst of `WIDTHS`."""
    counts = []
    for width in WIDTHS:
        pixels = [(x * width / 100, y * HEIGHT / 100) for x, y in places]
        x, y = pixels[i][0] + shift[0], pixels[i][1] + shift[1]
        points = sum(abs(x - a) < 13 and abs(y - b) < 12 for a, b in pixels)
        numbers = sum(abs(x - pixels[j][0] - a) < 18 and abs(y - pixels[j][1] - b) < 16 for j, (a, b) in enumerate(taken))
        counts.append(points + numbers + (x < 6) + (x > width + 10) + (y < 0) + (y > HEIGHT - 6))
    return max(counts)


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """A centred moving mean over about a twentieth of the series, over what is finite."""
    half = len(values) // 40
    if half == 0:
        return list(values)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    known = ([v for v in window if is_number(v)] for window in windows)
    return [sum(window) / len(window) if window else None for window in known]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` points: means of equal buckets, the first and last point kept as they are."""
    if len(points) <= MOST_POINTS:
        return points
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    buckets = [points[a:b] for a, b in pairwise(edges)]
    means = [(sum(x for x, _ in bucket) / len(bucket), sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]
    return [points[0], *means[1:-1], points[-1]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (steps of 1, 2 or 5 times a power of ten) that cover [low, high] with about `most` intervals at most."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with the 2s and 5s between them inside the first and last that are needed."""
    marks = [f * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for f in (1, 2, 5)]
    inside = [m for i, m in enumerate(marks[:-1]) if marks[i + 1] > low and (i == 0 or marks[i - 1] < high)]
    thin = [m for m in inside if f"{m:e}".startswith("1")]
    keep = inside if len(inside) <= 6 else [inside[0], *[m for m in thin if inside[0] < m < inside[-1]], inside[-1]]
    return keep if len(keep) > 1 else [keep[0], keep[0] * 10]
