"""Numbers as a person reads them: which values are numbers at all, and how each is written.

In: numbers. Out: text with true minus signs and no break before a unit. Decided here: how many
digits a person is shown.
"""

import math
from collections.abc import Sequence
from typing import Any

DASH = "–"  # in the place of what was not measured
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, percent: bool = False, places: int | None = None) -> str:
    """Three significant digits, unless `places` says how many decimals."""
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


def in_bits(bits: int | str) -> str:
    """How weights are packed: in so many bits, or in "nf4"."""
    return "in bitsandbytes' NF4" if bits == "nf4" else f"in {bits} bits"


def decimals(step: float) -> int:
    """How many decimals tell multiples of `step` apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def percent(share: float) -> str:
    """0.7123 → "71.2 %"."""
    return number(share, percent=True)


def points(share: float) -> str:
    """0.054 → "+5.4"; what rounds to nothing has no sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as the two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def amount(value: float, unit: str = "") -> str:
    """A large count with a decimal prefix: 1.23 GB, 4.5 M, 12.0 TFLOP."""
    for size, prefix in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def counted(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def finite(x: Sequence, y: Sequence) -> list[tuple[float, float]]:
    """The (x, y) pairs that are numbers; a gap or a NaN leaves no point."""
    return [
        (float(a), float(b)) for a, b in zip(x, y, strict=True) if is_number(a) and is_number(b)
    ]


def is_number(value: Any) -> bool:
    """Whether a value can be drawn and written.

    True, False and NaN cannot, nor can what no measurement gives.
    """
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and (value == 0 or 1e-100 < abs(value) < 1e100)
