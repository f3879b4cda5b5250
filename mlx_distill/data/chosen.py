"""Whether `data.where` keeps a row.

In: a column's value and what the recipe asks of it. Out: yes or no. Decided here: a number is
compared as a number, also where a table's cell holds it as text; "< 3", "<= 3", "> 3", ">= 3" and
"!= x" compare; a list asks for any of its items, and a column that holds a list needs one item that
fits.
"""

import re
from typing import Any

from mlx_distill.data.content import as_text

COMPARISON = re.compile(r"\s*(<=|>=|!=|<|>)\s*(.*?)\s*", re.DOTALL)


def fits(value: Any, asked: Any) -> bool:
    """Whether a column's value is what is asked for: a text, a number, a truth, or a list of
    these.
    """
    if isinstance(asked, list | tuple):
        return any(fits(value, one) for one in asked)
    if isinstance(value, list | tuple):
        return any(fits(one, asked) for one in value)
    if isinstance(asked, str):
        return _fits_text(value, asked)
    if isinstance(asked, bool):
        return as_text(value) == as_text(asked)
    return _number(value) == float(asked)


def _fits_text(value: Any, asked: str) -> bool:
    if as_text(value) == asked:
        return True
    compared = COMPARISON.fullmatch(asked)
    if not compared:
        return False
    sign, limit = compared.groups()
    found, wanted = _number(value), _number(limit)
    if sign == "!=":
        both = found is not None and wanted is not None
        return found != wanted if both else as_text(value) != limit
    if found is None or wanted is None:
        return False
    return {
        "<": found < wanted,
        "<=": found <= wanted,
        ">": found > wanted,
        ">=": found >= wanted,
    }[sign]


def _number(value: Any) -> float | None:
    """A number, or the one that a text says; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(as_text(value))
    except ValueError:
        return None
