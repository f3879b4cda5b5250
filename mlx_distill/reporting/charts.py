"""Charts before they are drawn: curves and points, by what they mean.

In: series of numbers. Out: `Curves` and `Scatter`s, which `drawing.py` draws and which a page
without pictures states in words. Decided here: what is left out, and how many points are drawn.
Roles name colours of the pages' style sheet.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlx_distill.words import finite, is_number, number, percent

MOST_POINTS = 300
MOST_NUMBERS = 100  # of a scatter: more can neither be read nor placed
LOG_RATIO = 40.0  # a positive series that spans more than this reads better on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One curve; `role` names its colour, `faint` ones are behind the others and not in the key.

    low, high: bounds of its y, finite, drawn as a band where given, or with `error_bars` as one
    bar a point. dots: (x, y) of what its points are the means of. faded: it is not what the chart
    is about; bold: it is.
    """

    label: str
    role: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    faint: bool = False
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dots: tuple[tuple[float, float], ...] = ()
    dashed: bool = False
    error_bars: bool = False
    faded: bool = False
    bold: bool = False

    @property
    def known(self) -> list[tuple[float, float]]:
        """Its points that are numbers."""
        return finite(self.x, self.y)

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The same, few enough to draw."""
        return thinned(self.known)


@dataclass(frozen=True)
class Level:
    """A y value drawn across the whole chart."""

    label: str
    role: str
    y: float

    def key(self, shares: bool) -> "Key":
        return Key(self.label, self.role, "", number(self.y, shares), dashed=True)


@dataclass(frozen=True)
class Key:
    """What a curve or level says in words: where it starts ("" for a level or a single point) and
    ends.
    """

    label: str
    role: str
    first: str
    last: str
    dashed: bool = False
    look: str = ""

    @property
    def before(self) -> str:
        """What stands before its end: a change that the digits do not show is none."""
        if not self.first:
            return ""
        return "unchanged, " if self.first == self.last else f"{self.first} → "


@dataclass(frozen=True)
class Curves:
    """Series over a shared x axis.

    x_values: where the ticks of x are, as far as they leave each other room; without them x counts
    steps. shares: whether y is a share, to be shown in per cent. from_zero: whether the y axis of
    positive values starts at 0. large: whether the chart has the page's whole width.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    shares: bool = False
    x_name: str = "step"
    x_values: tuple[float, ...] = ()
    levels: tuple[Level, ...] = ()
    from_zero: bool = True
    large: bool = False

    @property
    def ys(self) -> list[float]:
        """Everything that the y axis has to hold."""
        drawn = [y for one in self.series for _, y in [*one.drawn, *one.dots]]
        bounds = [y for one in self.series for y in (*one.low, *one.high)]
        return drawn + bounds + [level.y for level in self.levels]

    @property
    def log(self) -> bool:
        """Whether the y axis is logarithmic."""
        low, high = min(self.ys), max(self.ys)
        return not self.shares and low > 0 and high / low > LOG_RATIO

    @property
    def subtitle(self) -> str:
        return f"{self.unit}{', logarithmic' if self.log else ''}"

    @property
    def x_label(self) -> str:
        return self.x_name

    @property
    def numbered(self) -> list:
        """Curves have no numbered points."""
        return []

    @property
    def key(self) -> list[Key]:
        keys = [self._key(one) for one in self.series if not one.faint]
        return keys + [level.key(self.shares) for level in self.levels]

    def lines(self) -> list[str]:
        """The chart in words."""
        said = "; ".join(f"{one.label} {one.before}{one.last}" for one in self.key)
        return [f"{self.title} ({self.unit}), by {self.x_name}: {said}"]

    def _key(self, one: Series) -> Key:
        (_, first), (_, last) = one.known[0], one.known[-1]
        single = len(one.known) == 1
        said = ("" if single else number(first, self.shares)), number(last, self.shares)
        look = "faded" if one.faded else "bold" if one.bold else ""
        return Key(one.label, one.role, *said, one.dashed, look)


@dataclass(frozen=True)
class Point:
    """One point of a scatter: y in [low, high]; `joined` points lie on the scatter's line."""

    label: str
    role: str
    x: float
    y: float
    low: float
    high: float
    joined: bool


@dataclass(frozen=True)
class Scatter:
    """Shares y in [0, 1] over positive x, numbered by x, or of very many those alone that are
    joined; x_text: what a value of x says; levels: of models that cost nothing here.
    """

    title: str
    unit: str
    points: tuple[Point, ...]
    x_name: str
    x_text: Callable[[float], str]
    levels: tuple[Level, ...] = ()
    large: bool = True

    @property
    def log(self) -> bool:
        """Whether the x axis is logarithmic."""
        return self.points[-1].x / self.points[0].x > LOG_RATIO

    @property
    def with_number(self) -> tuple[Point, ...]:
        """The points that have a number."""
        if len(self.points) <= MOST_NUMBERS:
            return self.points
        return tuple(point for point in self.points if point.joined)

    @property
    def subtitle(self) -> str:
        some = len(self.with_number) < len(self.points)
        return f"{self.unit}; numbered are those that are joined" if some else self.unit

    @property
    def x_label(self) -> str:
        return f"{self.x_name}{', logarithmic' if self.log else ''}"

    @property
    def key(self) -> list[Key]:
        """Of the levels: points are told apart by their numbers."""
        return [level.key(shares=True) for level in self.levels]

    @property
    def numbered(self) -> list[tuple[int, str, str, bool]]:
        """(number, label, y and x in words, whether it is joined)."""
        return [
            (i, one.label, f"{percent(one.y)} · {self.x_text(one.x)}", one.joined)
            for i, one in enumerate(self.with_number, 1)
        ]

    def lines(self) -> list[str]:
        """The chart in words."""
        points = [
            f"{i}: {label}, {facts}{', joined' if joined else ''}"
            for i, label, facts, joined in self.numbered
        ]
        return points + [f"{one.label}, {one.last}" for one in self.key]


def line_chart(title: str, unit: str, series: Sequence[Series], **more: Any) -> Curves | None:
    """A chart of the series that have a point, None without one; `more` are fields of `Curves`."""
    drawn = tuple(one for one in series if one.known)
    return Curves(title, unit, drawn, **more) if drawn else None


def scatter(
    title: str,
    unit: str,
    points: Sequence[Point],
    x_name: str,
    x_text: Callable[[float], str],
    levels: tuple[Level, ...] = (),
) -> Scatter | None:
    """A scatter of points in the order of x; None without a point."""
    ordered = tuple(sorted(points, key=lambda point: (point.x, point.y)))
    return Scatter(title, unit, ordered, x_name, x_text, levels) if ordered else None


def smoothed(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """A centred moving mean over about a twentieth of the series, over what is finite."""
    half = len(values) // 40
    if half == 0:
        return tuple(values)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    known = (
        [value for value in window if value is not None and is_number(value)] for window in windows
    )
    return tuple(sum(window) / len(window) if window else None for window in known)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` points: means of equal buckets, and both ends as they are."""
    if len(points) <= MOST_POINTS:
        return points
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    buckets = [points[start:end] for start, end in pairwise(edges)]
    means = [(_mean(x for x, _ in bucket), _mean(y for _, y in bucket)) for bucket in buckets]
    return [points[0], *means[1:-1], points[-1]]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
