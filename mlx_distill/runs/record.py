"""Typed records: what a file of a run holds, stated once for whoever writes it and whoever reads it.

In: what was read from a file, or what a run knows. Out: a record, or in a few words what is wrong.
Decided here, for all of them: an absent key is one of an earlier stage or version and takes its
default; an unknown key is one of a newer version, which is kept and written again; anything else
that does not fit is damage. What was read is a stranger's: numbers are finite, and of a size that
something can have.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlx_distill.words import is_number


def _usable(value: float) -> float:
    if not is_number(value):
        raise ValueError("no number that anything can have")
    return value


def _or_none(value: Any) -> Any:
    """NaN is what a measurement leaves that failed, and null is how JSON says it."""
    return None if isinstance(value, float) and not is_number(value) else value


Number = Annotated[float, AfterValidator(_usable)]
Measured = Annotated[Number | None, BeforeValidator(_or_none)]
Count = Annotated[int, Field(ge=0, le=10**18)]


class Record(BaseModel):
    """What a file, or a part of one, holds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    FILE: ClassVar[str] = ""  # its name in a run folder; "" for a part
    SEALED: ClassVar[bool] = False  # whether the file holds the SHA-256 of all else in it

    def content(self) -> Any:
        """What goes into the file: the keys that are known, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


def damage(error: ValidationError) -> str:
    """What is wrong with content that is no record of its kind, in a few words."""
    first = error.errors(include_url=False)[0]
    found = repr(first["input"])
    found = found if len(found) <= 40 else f"{found[:40]}…"
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"it has no {where}"
    return f"its {where} is {found}" if where else f"it holds {found}"
