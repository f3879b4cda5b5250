"""Tables of a page, and links: what a cell says, how it qualifies that, and where it leads.

In: texts and addresses. Out: Markdown; their HTML is in `page.html.jinja`. Decided here: that an
address is relative to the page, so that a folder may be moved with its pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlx_distill.reporting.markdown import pipe_table, plain
from mlx_distill.words import DASH


@dataclass(frozen=True)
class Link:
    """A text, and where it leads: an address relative to the page."""

    text: str
    address: str

    def markdown(self) -> str:
        return f"[{plain(self.text)}]({self.address})"


@dataclass(frozen=True)
class Links:
    """A sentence's beginning, and links that end it."""

    text: str
    links: Sequence[Link]
    kind: ClassVar[str] = "links"

    def markdown(self, depth: int) -> str:
        return f"{plain(self.text)}: {', '.join(link.markdown() for link in self.links)}"


@dataclass(frozen=True)
class Cell:
    """A number or name, what qualifies it, and links that follow.

    look: classes of the style sheet; dot: the role of a coloured mark before it.
    """

    text: str
    small: str = ""
    look: str = ""
    dot: str = ""
    links: tuple[Link, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} ({self.small})" if self.small else self.text

    def classes(self, side: str) -> str:
        """Of the style sheet, in a column whose cells stand on this side."""
        looks = "n" if side == "r" else "", self.look, "none" if str(self) == DASH else ""
        return " ".join(filter(None, looks))

    def markdown(self) -> str:
        said = [plain(str(self))] if self.text else []
        return " ".join([*said, *(link.markdown() for link in self.links)])


@dataclass(frozen=True)
class Table:
    """Rows of cells; `align` has one letter a column, "l" or "r".

    shown_by_bars: the columns that the HTML leaves out, since bars above the table show them.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str
    look: str = ""
    shown_by_bars: tuple[str, ...] = ()
    kind: ClassVar[str] = "table"

    @property
    def columns(self) -> list[int]:
        """Those that the HTML has."""
        return [i for i, name in enumerate(self.head) if name not in self.shown_by_bars]

    def markdown(self, depth: int) -> str:
        rows = [[cell.markdown() for cell in row] for row in self.rows]
        return pipe_table([*self.head], rows, self.align)
