"""The kinds of values that a field of a recipe can hold, and the marks that it can bear.

Every number has both ends, so that arithmetic in float32 and int32 stays what it says and no time
is asked for that no one has. A type here is checked by pydantic; a mark says what a field is to the
digest of a recipe and to the runs of earlier versions.
"""

import datetime
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Range:
    """The numbers that a field can hold; `or_zero` where 0 is not one of them but has a meaning of
    its own.
    """

    low: float
    high: float
    or_zero: bool = False

    def __call__(self, value: float) -> float:
        if self.low <= value <= self.high or (self.or_zero and value == 0):
            return value
        raise PydanticCustomError("range", str(self))

    def __str__(self) -> str:
        return f"{'0, or ' if self.or_zero else ''}from {_number(self.low)} to {_number(self.high)}"


def _number(value: float) -> str:
    return f"{value:g}" if 0 < value < 1e-3 else f"{value:,}"


def within(low: float, high: float, or_zero: bool = False) -> AfterValidator:
    return AfterValidator(Range(low, high, or_zero))


def _day(value: Any) -> Any:
    """A day as text ("2026-11-26", or "" for none); TOML's own dates are days too."""
    text = value.isoformat() if type(value) is datetime.date else value
    try:
        known = text == "" or datetime.date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):
        known = False
    if not known:
        raise PydanticCustomError("day", "Input should be a day like 2026-11-26")
    return text


def _condition(value: Any) -> Any:
    """What data.where asks of a column."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(one, str | bool | int | float) for one in items):
        raise PydanticCustomError("condition", "a text, a number, true, false or a list of these")
    return value


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "a list that names nothing twice")
    return values


@dataclass(frozen=True)
class OutsideDigest:
    """A field that says where things are kept, or what a run is shown beside."""


@dataclass(frozen=True)
class FormerDefault:
    """What a field held by default in earlier versions, whose runs have it in their recipe.toml.

    Where nothing reads the field this may still stand, and the digest has it.
    """

    value: Any


@dataclass(frozen=True)
class CameLater:
    """A field that earlier versions did not have, and the value that says what they did.

    The recipe.toml of their runs lacks the field and means this value, which no digest contains.
    """

    value: Any


Segment = Literal["prompt", "cot", "answer"]
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "mixed_kl",
    "entropy_kl",
    "dkd",
]
Condition = Annotated[Any, AfterValidator(_condition)]
AS_LIST = Field(strict=False)  # TOML has lists, no tuples
DISTINCT = AfterValidator(_distinct)
Names = Annotated[tuple[str, ...], AS_LIST, DISTINCT]
Segments = Annotated[tuple[Segment, ...], Field(min_length=1, strict=False), DISTINCT]
Layers = Annotated[tuple[Annotated[int, within(1, 1000)], ...], AS_LIST, DISTINCT]
Trackers = Annotated[tuple[Literal["trackio", "tensorboard", "wandb"], ...], AS_LIST, DISTINCT]
Fraction = Annotated[float, within(1e-6, 1.0)]
Weight = Annotated[float, within(1e-6, 1.0, or_zero=True)]
# float32 knows no number nearer to 1 that a sum of 1 - beta survives
Momentum = Annotated[float, within(1e-6, 0.999999, or_zero=True)]
Rows = Annotated[int, within(1, 10**9)]
Tokens = Annotated[int, within(1, 2**24)]
Cadence = Annotated[int, within(0, 10**9)]
# TOML's integers end there, torch's and MLX's seeds soon after
Seed = Annotated[int, within(0, 2**63 - 1)]
Day = Annotated[str, BeforeValidator(_day)]
