"""Where an axis has its ticks, and what they say.

In: the values that an axis is to hold. Out: round marks around them, by matplotlib's locators.
Decided here: how many there are, and which of them leave each other room.
"""

from collections.abc import Sequence

from mlx_distill.words import decimals, number

GAP, LETTER = 6, 7  # pixels between the texts of two ticks, and of a letter


def round_marks(low: float, high: float, most: int) -> list[float]:
    """Steps of 1, 2 or 5 times a power of ten that cover [low, high] in about `most` intervals."""
    from matplotlib.ticker import MaxNLocator

    if high == low:
        high = low + (abs(low) or 1.0)
    marks = MaxNLocator(most, steps=(1, 2, 5, 10)).tick_values(low, high)
    return _around([float(f"{mark:.12g}") for mark in marks], low, high)


def powers(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], and nothing between them."""
    from matplotlib.ticker import LogLocator

    return _around(LogLocator(numticks=7).tick_values(low, high), low, high)


def decade(mark: float) -> str:
    """What a power of ten says: 0.1, 1, 10."""
    return f"{mark:,.12g}" if 1e-4 < mark < 1e6 else number(mark)


def _around(marks: Sequence[float], low: float, high: float) -> list[float]:
    """Of ascending marks those in [low, high], and the next beyond an end that is none."""
    marks = [float(mark) for mark in marks]
    first = max((mark for mark in marks if mark <= low), default=low)
    last = min((mark for mark in marks if mark >= high), default=high)
    return [mark for mark in marks if first <= mark <= last]


def texts(marks: Sequence[float], shares: bool) -> list[str]:
    """What evenly spaced marks say: as many decimals as tell them apart."""
    gap, largest = marks[1] - marks[0], max(map(abs, marks))
    if not shares and not 1e-3 <= largest < 1e5:
        return [number(mark) for mark in marks]
    places = decimals(100 * gap if shares else gap)
    return [number(mark, shares, places) for mark in marks]


def whole_numbers(low: float, high: float, width: int) -> list[float]:
    """Round whole numbers in [low, high] that leave each other room on `width` pixels."""
    most = int(width / (2 * GAP + LETTER * len(f"{high:,.0f}")))
    marks = round_marks(low, high, max(1, min(6, most)))
    return [mark for mark in marks if low <= mark <= high and mark == int(mark)]


def with_room(places: Sequence[float], said: Sequence[str]) -> list[int]:
    """Which of the ticks at ascending `places` (pixels) to show: the last, and those that leave it
    and each other room.
    """
    room = GAP + LETTER * max(map(len, said))
    kept: list[int] = []
    for i, place in enumerate(places[:-1]):
        if places[-1] - place >= room and (not kept or place - places[kept[-1]] >= room):
            kept.append(i)
    return [*kept, len(places) - 1]
