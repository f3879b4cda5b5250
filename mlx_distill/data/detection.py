"""`format = "auto"`: what the rows of a source hold, found from its first ones.

In: a recipe, or its `[data]` table. Out: the same with a format, and with the columns that have
other names than the format's usual ones. Decided here: every reading whose columns are there is
tried on the first rows, and the first of those that understand most of them is taken. A source
that is not there, and rows that nothing reads, are told by whoever reads them next, by the former
default ("columns").
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mlx_distill.data.chosen import fits
from mlx_distill.data.columns import COLUMNS, Place
from mlx_distill.data.examples import Skip
from mlx_distill.data.formats import FORMATS
from mlx_distill.data.named import resolved
from mlx_distill.data.sources import Row, rows_of
from mlx_distill.errors import DistillError, RecipeError
from mlx_distill.recipe.contradictions import contradictions
from mlx_distill.recipe.read_when import unread
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.recipe.tables import DataTable

FIRST_ROWS = 20
FALLBACK = "columns"
# the order in which readings are tried: one that asks for more of a row stands first
TRIED = ("messages", "conversations", "gsm8k", "alpaca", "columns", "response")
ROLES = ("prompt", "cot", "answer", "response", "messages")
# other names that people give to these columns, the likeliest first
ALSO_CALLED = {
    "prompt": ("question", "problem", "instruction", "query", "input", "prompt", "user"),
    "cot": (
        "reasoning",
        "thinking",
        "thought",
        "thoughts",
        "chain_of_thought",
        "rationale",
        "reasoning_content",
        "explanation",
        "deepseek_thinking_trajectory",
        "steps",
        "solution",
    ),
    "answer": (
        "final_answer",
        "answer",
        "response",
        "output",
        "completion",
        "label",
        "target",
        "deepseek_attempt",
        "solution",
    ),
    "response": (
        "completion",
        "output",
        "answer",
        "solution",
        "generation",
        "llm_response",
        "r1_solution_1",
        "text",
    ),
    "messages": ("conversations", "messages", "conversation", "chat", "dialogue", "dialog"),
}


def with_format(recipe: Recipe) -> Recipe:
    """The recipe with the format of its rows, where it says "auto" and they lie in a file; those of
    the hub are looked at when they are read. Raises `RecipeError` for column settings that the
    format which was found does not read.
    """
    if resolved(recipe.data).format != "auto" or not _file_of(recipe.data).is_file():
        return recipe
    found = detected(recipe.data, all_written(recipe))
    settled = with_values(recipe, data=_changes(recipe.data, found))
    for line in (*contradictions(settled), *unread(settled)):
        raise RecipeError(f"{recipe.data.source} holds format {found.format!r}: {line}")
    return settled


def all_written(recipe: Recipe) -> bool:
    """Whether a model answers all prompts, so that rows need no solution."""
    return recipe.rollouts.by != "data" and recipe.rollouts.share == 1


def about_format(asked: DataTable, found: DataTable) -> str:
    """For a person: what was found; "" where the recipe said it, and where nothing was found."""
    if resolved(asked).format != "auto" or not found_reading(found):
        return ""
    columns = [
        f"{role} = {name!r}"
        for role in COLUMNS[found.format]
        if (name := getattr(found, f"{role}_column") or COLUMNS[found.format][role])
    ]
    return f'data: format = "{found.format}" by its first rows ({", ".join(columns)})'


def detected(data: DataTable, written: bool = False) -> DataTable:
    """The table with a format and its columns; the same where it has one. `written`: as
    `all_written` says.
    """
    if data.format != "auto":
        return data
    return found_reading(data, written) or data.model_copy(update={"format": FALLBACK})


def found_reading(data: DataTable, written: bool = False) -> DataTable | None:
    """What the first rows hold, None where nothing reads them or there are none."""
    if data.source.startswith("embedded:"):
        return None
    try:
        rows = first_rows(data)
    except DistillError:
        if not _file_of(data).is_file():  # the hub, which may take its time to say no
            raise
        return None  # whoever reads the rows next says it
    return best_reading(data, rows, written)


def first_rows(data: DataTable) -> tuple[tuple[str, Row], ...]:
    """The first rows that `data.where` chooses, read once as long as the file stays the same."""
    path = _file_of(data)
    status = path.stat() if path.is_file() else None
    return _kept_rows(_Key(data), status and (status.st_size, status.st_mtime_ns))


def _file_of(data: DataTable) -> Path:
    return Path(data.source).expanduser()


class _Key:
    """A table as a key: what decides which rows there are."""

    def __init__(self, data: DataTable):
        self.data = data
        self.name = (data.source, data.config, data.split, repr(data.where), data.stream_rows)

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name


@lru_cache(maxsize=32)
def _kept_rows(key: _Key, status: tuple[int, int] | None) -> tuple[tuple[str, Row], ...]:
    chosen = (
        (where, row)
        for where, row in rows_of(key.data)
        if all(fits(row.get(name), asked) for name, asked in key.data.where.items())
    )
    return tuple(itertools.islice(chosen, FIRST_ROWS))


def best_reading(
    data: DataTable, rows: tuple[tuple[str, Row], ...], written: bool = False
) -> DataTable | None:
    """The reading that understands most of the rows, the first of equals; None where none has its
    columns there. Rows that only ask will do where all are to be `written`.
    """
    there = {name for _, row in rows for name in row}
    best, most = None, -1
    for reading in _readings(data, there, TRIED):
        understood = sum(_is_understood(reading, where, row) for where, row in rows)
        if understood > most:
            best, most = reading, understood
    if written and most < 1:
        best = next(_readings(data, there, ("prompts",)), best)
    return best


def _readings(data: DataTable, there: set[str], formats: tuple[str, ...]) -> Iterator[DataTable]:
    """Every format that reads what the recipe names, with columns that are there: first with its usual names, then with others."""
    named = {role for role in ROLES if getattr(data, f"{role}_column")}
    for usual in (True, False):
        for name in formats:
            if name == "alpaca" and not usual:  # it is its names; else it is "response"
                continue
            roles = COLUMNS[name]
            if not named <= roles.keys():
                continue
            choices = [_names_for(data, name, role, usual, there) for role in roles]
            for columns in itertools.product(*choices):
                if len(set(columns)) == len(columns):
                    chosen = dict(zip(roles, columns, strict=True))
                    yield _as_table(data, name, chosen)


def _names_for(data: DataTable, format_: str, role: str, usual: bool, there: set[str]) -> list[str]:
    """Columns that may play a role: the one that the recipe names, or those that are there."""
    named = getattr(data, f"{role}_column")
    names = [named] if named else [COLUMNS[format_][role]]
    if not named and not usual:
        names += [name for name in ALSO_CALLED[role] if name not in names]
        lower = {one.lower(): one for one in there}
        names = [lower.get(name, name) for name in names]
    return [name for name in names if name in there]


def _as_table(data: DataTable, format_: str, columns: dict[str, str]) -> DataTable:
    changes = {"format": format_}
    for role, name in columns.items():
        if name != COLUMNS[format_][role]:
            changes[f"{role}_column"] = name
    return data.model_copy(update=changes)


def _changes(asked: DataTable, found: DataTable) -> dict[str, str]:
    names = ("format", *(f"{role}_column" for role in ROLES))
    return {
        name: getattr(found, name) for name in names if getattr(found, name) != getattr(asked, name)
    }


def _is_understood(data: DataTable, where: str, row: Row) -> bool:
    try:
        FORMATS[data.format](row, Place(where, data))
    except (DistillError, Skip):
        return False
    return True
