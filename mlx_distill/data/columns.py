"""The columns of a row: which of them a format reads, and their values.

In: a row and the `[data]` table. Out: text, messages, values. Decided here: the usual names of each
format's columns (`COLUMNS`, `OPTIONAL`), and what to do about a column that is not there or holds
something else.
"""

import difflib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.content import as_text, printable
from mlx_distill.data.messages import Message, read_message
from mlx_distill.data.sources import Row
from mlx_distill.data.turns import join_channels
from mlx_distill.errors import DataError
from mlx_distill.readers import parse_json
from mlx_distill.recipe.tables import DataTable

COLUMNS: dict[str, dict[str, str]] = {
    "columns": {"prompt": "prompt", "cot": "cot", "answer": "answer"},
    "response": {"prompt": "prompt", "response": "response"},
    "alpaca": {"prompt": "instruction", "response": "output"},
    "messages": {"messages": "messages"},
    "conversations": {"messages": "conversations"},
    "gsm8k": {"prompt": "question", "answer": "answer"},
    "prompts": {"prompt": "prompt"},
}
CHAT_COLUMNS = ("system", "tools", "functions")
# columns that a recipe can name, read where a row has them
OPTIONAL_ROLES: dict[str, tuple[str, ...]] = {"prompts": ("answer",)}
OPTIONAL: dict[str, tuple[str, ...]] = {  # columns that are read where a row has them
    "columns": CHAT_COLUMNS,
    "response": CHAT_COLUMNS,
    "alpaca": ("input", "history", *CHAT_COLUMNS),
    "messages": CHAT_COLUMNS,
    "conversations": CHAT_COLUMNS,
    "gsm8k": (),
    "prompts": CHAT_COLUMNS,
}


@dataclass(frozen=True)
class Place:
    """Where a row was read, for error messages: the source, the line or row, and the recipe's
    `[data]` table.
    """

    where: str
    data: DataTable
    unused: Counter[str] = field(default_factory=Counter)

    def value(self, row: Row, role: str) -> Any:
        """The value of the column that plays `role` ("prompt", "cot", …); raises `DataError` where
        there is none.
        """
        return self.cell(row, self.column(role), f"data.{role}_column")

    def column(self, role: str) -> str:
        return column_of(self.data, role)

    def cell(self, row: Row, column: str, setting: str) -> Any:
        if column in row:
            return row[column]
        raise DataError(
            f"{self.where}: no column {column!r}, found "
            f"{', '.join(map(printable, row)) or 'none'}; {self._hint(row, column, setting)}"
        )

    def _hint(self, row: Row, column: str, setting: str) -> str:
        if setting == "data.where":
            near = difflib.get_close_matches(column, row, 1, 0.5)
            return (
                f"did you mean {near[0]!r}? Correct data.where"
                if near
                else "set data.where to one of these"
            )
        fitting = [name for name, columns in COLUMNS.items() if row.keys() >= set(columns.values())]
        others = {column_of(self.data, role) for role in COLUMNS[self.data.format]} - {column}
        if fitting and self.data.format not in fitting and not others & row.keys():
            best = max(fitting, key=lambda name: len(COLUMNS[name]))
            return f'these are the columns of format "{best}": set data.format = "{best}"'
        if len(row) == 1 and column in (only := next(iter(row))):
            return (
                f"are columns in {printable(only)!r} separated by something else than a "
                "comma, semicolon, tab or bar? Use one of these"
            )
        free = row.keys() - others - {*OPTIONAL[self.data.format]}
        if near := difflib.get_close_matches(column, sorted(free), 1, 0.5):
            return f"did you mean {near[0]!r}? Set {setting}"
        if not row:
            return "is the row empty? Delete it"
        return f"set {setting}" if free else "add it, or delete the row"

    def text(self, row: Row, role: str) -> str:
        """A column's value as text: numbers are written out, null is empty."""
        value = self.value(row, role)
        if isinstance(value, list | dict | bytes):
            kind = type(value).__name__
            raise DataError(
                f"{self.where}: column {self.column(role)!r} holds a {kind}, text was expected; "
                f"{_what_holds(value) or f'set data.{role}_column to another column'}"
            )
        return as_text(value)

    def messages(
        self, row: Row, role: str, who: str = "role", what: str = "content"
    ) -> list[Message]:
        """A column that holds a list of messages."""
        value, column = self.value(row, role), self.column(role)
        advice = "set data.format to what it holds"
        if isinstance(value, str):
            try:
                value = parse_json(value, self.where)
            except DataError:
                advice = (
                    "a list in a table's cell is to be JSON"
                    if value.lstrip()[:1] == "["
                    else advice
                )
        if not isinstance(value, list) or not all(
            isinstance(turn, dict) and who in turn for turn in value
        ):
            raise DataError(
                f"{self.where}: column {column!r} is no list of objects with {who!r} and {what!r}; "
                f"{_what_holds(value) or advice}"
            )
        return join_channels([read_message(turn, who, what, self.unused) for turn in value])


def column_of(data: DataTable, role: str) -> str:
    """The column that plays a role: as the recipe names it, or by the format's usual name."""
    return getattr(data, f"{role}_column") or COLUMNS[data.format].get(role, role)


def _what_holds(value: Any) -> str:
    """Advice for a value that another format reads."""
    for kind, who in (("messages", "role"), ("conversations", "from")):
        if (
            isinstance(value, list)
            and value
            and all(isinstance(turn, dict) and who in turn for turn in value)
        ):
            return f'its objects have {who!r}: set data.format = "{kind}" and data.messages_column'
    return ""
