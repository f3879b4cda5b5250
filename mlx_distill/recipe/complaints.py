"""The words of an error about a recipe: the nearest name, what was expected, what was found."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


def near(name: str, known: Iterable[str]) -> str:
    """For an error's end: the nearest known name, and all of them."""
    found = difflib.get_close_matches(name[:60], list(known), 1)
    return (f"; did you mean {found[0]!r}?" if found else ";") + f" Choices: {', '.join(known)}"


def describe(error: ValidationError) -> str:
    """Pydantic's first complaint in a line: table and field, what it should be, what was found."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    table, field, *rest = (*first["loc"], "")
    where = (f"[{table}] {field}" if field != "" else str(table)) + "".join(
        f"[{part}]" for part in rest if part != ""
    )
    found = first.get("input")
    expected = first["msg"].removeprefix("Input ").removeprefix("should be ")
    expected = expected.replace("a valid tuple", "a list").replace("a valid dictionary", "a table")
    if first["type"] == "too_short":
        expected = f"a list of at least {first['ctx']['min_length']}"
    choices = first.get("ctx", {}).get("expected", "")
    near = difflib.get_close_matches(
        str(found)[:60], choices.replace("'", "").replace(" or ", ", ").split(", "), 1
    )
    return f"{where} should be {expected}, found {found_as(found)}" + (
        f"; did you mean {near[0]!r}?" if near and near[0] else ""
    )


def found_as(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    return short(repr(value))


def short(text: str) -> str:
    """The beginning and the end of a text that is too long for an error."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-20:]}"
