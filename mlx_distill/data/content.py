"""What a value of a row says: whether it says anything, as text, and its name in an account."""

import math
from collections import Counter
from typing import Any


def has_content(value: Any) -> bool:
    """Whether a value says anything: null, empty text, NaN, and lists and objects of nothing else
    do not.
    """
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_content, value))
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def as_text(value: Any) -> str:
    """A scalar as text: numbers are written out, null and what is no number are empty."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if has_content(value) or isinstance(value, str) else ""


def count_unused(found: dict[str, Any], known: Any, kind: str, unused: Counter[str]) -> None:
    """Count by name what has content and is not known."""
    for name, value in found.items():
        if name not in known and has_content(value):
            unused[f"{kind} {printable(name)}"] += 1


def printable(name: Any) -> str:
    """A name that data gave, fit for a terminal."""
    text = str(name)
    text = text if len(text) <= 60 else f"{text[:59]}…"
    if not text.strip():
        return repr(text)
    return (
        text
        if text.isprintable()
        else repr(text)[1:-1].encode("ascii", "backslashreplace").decode()
    )
