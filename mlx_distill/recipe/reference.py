"""The page that shows every field: `recipes/reference.toml`, written from the tables.

    python -m mlx_distill.recipe.reference > recipes/reference.toml

Each line is a field with its default, the sentence that stands under it in `tables`, its choices or
its range, and the settings without which nothing reads it.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mlx_distill.recipe.defaults import FOLLOWS
from mlx_distill.recipe.read_when import READ_WHEN
from mlx_distill.recipe.recipe import TABLES
from mlx_distill.recipe.values import Range

HEAD = """\
# Every table and field of a recipe, each with its default. A recipe needs only the fields that it changes.
# Any field can also be set on the command line: --set table.field=value
# A number outside of its range (from … to …) is refused: no arithmetic in float32 or int32 keeps its meaning there.
# LoRA Without Regret: Schulman et al. 2025, https://thinkingmachines.ai/blog/lora
# This page is written by the program: python -m mlx_distill.recipe.reference > recipes/reference.toml
"""
COMMENT_COLUMN = 35


def reference() -> str:
    """The text of `recipes/reference.toml`: a recipe, once it names its models and its data."""
    parts = [HEAD]
    for table, part in TABLES.items():
        lines = [_line(table, field, info) for field, info in part.model_fields.items()]
        parts.append("\n".join((f"[{table}]", *lines, "")))
    return "\n".join(parts)


def range_of(info: FieldInfo) -> Range | None:
    """The range of a field that holds a number."""
    functions = (getattr(one, "func", None) for one in info.metadata)
    return next((one for one in functions if isinstance(one, Range)), None)


def _line(table: str, field: str, info: FieldInfo) -> str:
    assert info.description, f"{table}.{field} has no sentence under it"
    setting = f"{field} = {json.dumps(info.default, ensure_ascii=False)}"
    sentence = " ".join(info.description.split()).rstrip(".")
    about = " · ".join((sentence, *_limits(f"{table}.{field}", info)))
    return f"{setting:<{COMMENT_COLUMN - 1}} # {about}"


def _limits(path: str, info: FieldInfo) -> Iterator[str]:
    if choices := _choices(info.annotation):
        yield choices
    if bounds := range_of(info):
        yield str(bounds)
    if path in FOLLOWS:
        yield f"{FOLLOWS[path].words}, unless set"
    if path in READ_WHEN:
        yield f"read only with {READ_WHEN[path].words}"


def _choices(annotation: Any) -> str:
    """The words that a field can hold, as TOML writes them; "" where any will do."""
    if get_origin(annotation) is tuple:
        inner = _choices(get_args(annotation)[0])
        return inner and f"any of {inner}"
    if get_origin(annotation) is not Literal:
        return ""
    return ", ".join(json.dumps(one) for one in get_args(annotation))


if __name__ == "__main__":
    print(reference(), end="")
