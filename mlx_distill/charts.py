"""Curves and bars as positions in per cent, ready for a template to draw at any width.

In: series of numbers. Out: `Chart`s whose lines live in a 100 × 100 box and whose ticks know their place and their text.
Decided here: round ticks, when an axis is logarithmic, how many points are drawn. Nothing here knows HTML or colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_POINTS = 300
LOG_RATIO = 40.0  # a positive series that spans more than this reads better on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One curve before it is drawn; `role` names its look in the style sheet, `faint` draws it behind the others."""

    label: str
    role: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


@dataclass(frozen=True)
class Tick:
    """A mark at `place` per cent of an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve as SVG `points` in a 100 × 100 box (y grows downwards), with its first and last value as text."""

    label: str
    role: str
    points: str
    first: str
    last: str
    end: tuple[float, float]
    faint: bool


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    log: bool


def line_chart(title: str, unit: str, series: Sequence[Series], percent: bool = False) -> Chart | None:
    """A chart of `series` over a shared x axis; None where no series has a finite point."""
    drawn = [(one, points) for one in series if (points := thinned(finite(one.x, one.y)))]
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    log = not percent and min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    y_marks = log_ticks(min(ys), max(ys)) if log else ticks(0.0 if min(ys) >= 0 else min(ys), max(ys), 5)
    x_low = min(xs) if min(xs) > 1 else 0.0
    x_high = max(max(xs), x_low + 1)
    x_marks = [mark for mark in ticks(x_low, x_high, 6) if x_low <= mark <= x_high and mark == int(mark)]
    warp = math.log if log else float
    low, high = warp(min(y_marks)), warp(max(y_marks))

    def place_x(x: float) -> float:
        return 100 * (x - x_low) / (x_high - x_low)

    def place_y(y: float) -> float:
        return 100 * (1 - (warp(y) - low) / (high - low))

    def line(one: Series, points: list[tuple[float, float]]) -> Line:
        placed = [(place_x(x), place_y(y)) for x, y in points]
        text = " ".join(f"{x:.2f},{y:.2f}" for x, y in placed)
        known = finite(one.x, one.y)
        return Line(one.label, one.role, text, number(known[0][1], percent), number(known[-1][1], percent), placed[-1], one.faint)

    gap = y_marks[1] - y_marks[0]
    return Chart(
        title, unit, [line(one, points) for one, points in drawn],
        [Tick(place_x(x), f"{x:,.0f}") for x in x_marks],
        [Tick(place_y(y), number(y, percent, 0 if percent else None if log else decimals(gap))) for y in y_marks],
        log,
    )


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """A centred moving mean over about a twentieth of the series, over what is finite."""
    half = len(values) // 40
    if half == 0:
        return list(values)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    known = ([v for v in window if _is_finite(v)] for window in windows)
    return [sum(window) / len(window) if window else None for window in known]


def finite(x: Sequence, y: Sequence) -> list[tuple[float, float]]:
    """The (x, y) pairs that are numbers; a gap or a NaN leaves no point."""
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True) if _is_finite(a) and _is_finite(b)]


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def decimals(step: float) -> int:
    """How many decimals tell multiples of `step` apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def number(value: float, percent: bool = False, places: int | None = None) -> str:
    """A value as text: three significant digits unless `places` says how many decimals; true minus, no break before %."""
    if percent:
        text = f"{100 * value:.{1 if places is None else places}f}\u00a0%"
    elif places is not None:
        text = f"{value:,.{places}f}"
    elif value == 0:
        text = "0"
    elif 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")
