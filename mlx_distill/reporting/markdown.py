"""Markdown: text, lists and tables in which nothing that a user wrote is taken for markup.

In: text. Out: Markdown.
"""

from collections.abc import Iterable

ESCAPED = {"\\": "\\\\", "<": "&lt;", **{mark: f"\\{mark}" for mark in "*_`["}}


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def bullets(lines: Iterable[str]) -> str:
    """A list, its lines escaped."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def code(text: str) -> str:
    """Lines that are shown as they are."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def table(head: list[str], rows: list[list[str]], align: str) -> str:
    """A pipe table, its cells escaped; `align` has one letter a column, "l" or "r"."""
    return pipe_table(head, [[plain(str(cell)) for cell in row] for row in rows], align)


def pipe_table(head: list[str], rows: list[list[str]], align: str) -> str:
    """The same of cells that are Markdown already."""
    rule = ["---:" if side == "r" else "---" for side in align]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *cells])
