"""A page: a headline and a list of sections, stated once and rendered to Markdown and to one
self-contained HTML file.

In: sections of blocks (a note, a table, bars, charts, …). Out: `report.md` and `report.html`. Each
block knows its Markdown; its HTML is the macro of the same name in `page.html.jinja`, whose look is
in `page.css`. Decided here: what each of the two shows where they differ, for Markdown has no bars
and no curves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mlx_distill.errors import RunError
from mlx_distill.files import told_as, write_text
from mlx_distill.reporting.charts import Curves, Scatter
from mlx_distill.reporting.drawing import drawings
from mlx_distill.reporting.markdown import bullets, code, plain
from mlx_distill.runs.own_files import LOCK
from mlx_distill.words import percent

TITLE_END = "· mlx-distill</title>"  # of every page that was ever written
LONGEST_HEAD = 10_000  # bytes of a page up to there


class Block(Protocol):
    """A piece of a section. kind: the name of its macro."""

    kind: ClassVar[str]

    def markdown(self, depth: int) -> str:
        """The block as Markdown, headings inside it `depth` levels deep; "" where Markdown leaves
        it out.
        """
        ...


@dataclass(frozen=True)
class Note:
    """A sentence; `strong` where it must not be overlooked."""

    text: str
    strong: bool = False
    kind: ClassVar[str] = "note"

    def markdown(self, depth: int) -> str:
        return plain(self.text)


@dataclass(frozen=True)
class Bar:
    """An accuracy to draw, with the single runs it is the mean of."""

    label: str
    remark: str
    role: str
    mean: float
    low: float
    high: float
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bars:
    """Accuracies with their intervals. Markdown has the table beside them."""

    bars: Sequence[Bar]
    kind: ClassVar[str] = "bars"

    def markdown(self, depth: int) -> str:
        return ""


@dataclass(frozen=True)
class Charts:
    """Curves beside each other, or large ones. Markdown says where each begins and ends."""

    charts: Sequence[Curves | Scatter]
    kind: ClassVar[str] = "charts"

    def markdown(self, depth: int) -> str:
        return bullets(line for chart in self.charts for line in chart.lines())


@dataclass(frozen=True)
class Tiles:
    """(value, name, remark) of a few figures."""

    tiles: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "tiles"

    def markdown(self, depth: int) -> str:
        return bullets(
            f"{name}: {value}{f' ({remark})' if remark else ''}"
            for value, name, remark in self.tiles
        )


@dataclass(frozen=True)
class Facts:
    """(name, value) of things known."""

    facts: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"

    def markdown(self, depth: int) -> str:
        return bullets(f"{name}: {value}" for name, value in self.facts)


@dataclass(frozen=True)
class Fields:
    """(table, [(field, value, whether it differs from the default)]) of a recipe."""

    tables: Sequence[tuple[str, Sequence[tuple[str, str, bool]]]]
    kind: ClassVar[str] = "fields"

    def markdown(self, depth: int) -> str:
        return "\n".join(
            f"- {plain(f'[{name}]')} {', '.join(map(self._text, fields))}"
            for name, fields in self.tables
        )

    def _text(self, field: tuple[str, str, bool]) -> str:
        name, value, changed = field
        text = plain(f"{name} = {value}")
        return f"**{text}**" if changed else text


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one look: "loss", "read" or "cut". edge: what begins here, "cut" or
    "kept from here".
    """

    text: str
    segment: str
    look: str
    edge: str


@dataclass(frozen=True)
class Example:
    """The tokens of a sequence, and for each segment (role, name, what is said of it, "faded" where
    none of it is learned). Markdown has the latter alone.
    """

    pieces: Sequence[Piece]
    legend: Sequence[tuple[str, str, str, str]]
    kind: ClassVar[str] = "example"

    def markdown(self, depth: int) -> str:
        return bullets(f"{name}: {words}" for _, name, words, _ in self.legend)


@dataclass(frozen=True)
class Said:
    """A text that a model wrote. role: whose colour it has; verdict: "right", "wrong" or
    "unfinished".
    """

    role: str
    label: str
    verdict: str
    thinking: str
    answer: str


@dataclass(frozen=True)
class Wrote:
    """A problem, and what each model wrote for it."""

    problem: str
    expected: str
    texts: Sequence[Said]
    kind: ClassVar[str] = "wrote"

    def markdown(self, depth: int) -> str:
        asked = f"{plain(self.problem)} (expected: {plain(self.expected)})"
        said = [
            f"{plain(text.label)}, {text.verdict}:\n\n{code(text.thinking)}\n\n{code(text.answer)}"
            for text in self.texts
        ]
        return _joined([asked, *said])


@dataclass(frozen=True)
class Command:
    """A command to type."""

    text: str
    kind: ClassVar[str] = "command"

    def markdown(self, depth: int) -> str:
        return code(self.text)


@dataclass(frozen=True)
class Copied:
    """Lines with a button that copies them."""

    text: str
    kind: ClassVar[str] = "copied"

    def markdown(self, depth: int) -> str:
        return code(self.text)


@dataclass(frozen=True)
class Beside:
    """Blocks that stand beside each other where the page is wide enough."""

    blocks: Sequence[Block]
    kind: ClassVar[str] = "beside"

    def markdown(self, depth: int) -> str:
        return _joined(block.markdown(depth) for block in self.blocks)


@dataclass(frozen=True)
class Fold:
    """A page within the page, closed until it is asked for."""

    title: str
    remark: str
    leads: Sequence[str]
    sections: Sequence["Section"]
    blocks: Sequence[Block] = ()
    look: str = ""
    kind: ClassVar[str] = "fold"

    def markdown(self, depth: int) -> str:
        sections = [section.markdown(depth + 1) for section in self.sections]
        return _joined(
            [
                f"{'#' * depth} {plain(self.title)}",
                plain(self.remark),
                *map(plain, self.leads),
                *(block.markdown(depth + 1) for block in self.blocks),
                *sections,
            ]
        )


@dataclass(frozen=True)
class Section:
    """A title, what qualifies it, and blocks."""

    title: str
    blocks: Sequence[Block]
    remark: str = ""

    def markdown(self, depth: int) -> str:
        heading = (
            f"{'#' * depth} {plain(self.title)}{plain(f' ({self.remark})') if self.remark else ''}"
        )
        return _joined([heading, *(block.markdown(depth + 1) for block in self.blocks)])


@dataclass(frozen=True)
class Page:
    """A page. about: what stands above the headline, its name first. question: in its author's
    words, "" without one.
    """

    about: Sequence[str]
    headline: str
    question: str
    leads: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str]

    def markdown(self) -> str:
        """The page as Markdown."""
        said = [f"# {plain(self.headline)}", plain(self.question), *map(plain, self.leads)]
        sections = [section.markdown(2) for section in self.sections]
        notes = ["## How to read this", bullets(self.notes)] if self.notes else []
        return _joined([*said, *sections, *notes]).replace("\u00a0", " ") + "\n"

    def html(self) -> str:
        """The page as one HTML file that needs no other file and no network, all text escaped."""
        style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
        return _template().render(page=self, style=style)


@dataclass(frozen=True)
class Report:
    """Where a page was written, and its first sentence."""

    markdown: Path
    html: Path
    headline: str

    def __str__(self) -> str:
        return str(self.html)


def write(page: Page, out: Path) -> Report:
    """Put `report.md` and `report.html` into the folder `out`, made if need be, each whole or not
    at all. Those of an earlier page are replaced.

    Raises `RunError` where that cannot be done, or where somebody else's files have these names.
    """
    written = Report(out / "report.md", out / "report.html", page.headline)
    with told_as(RunError, out):
        out.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(written)
    for path, text in ((written.html, page.html()), (written.markdown, page.markdown())):
        with told_as(RunError, path):
            write_text(path, text)
    return written


def _refuse_foreign(there: Report) -> None:
    """A run (which has a recipe) or a sweep (results) knows its files by name; elsewhere a page of
    ours says so in its title, and the Markdown beside it is of the same page."""
    paths = [path for path in (there.html, there.markdown) if path.exists()]
    beside = {path.name for path in there.html.parent.iterdir()}
    ours = LOCK in beside and beside & {"recipe.toml", "results.csv"}
    if not paths or ours or _is_a_page(there.html):
        return
    raise RunError(
        f"{paths[0]} is there, and mlx-distill did not write it: move it away, or name another "
        "folder with --out"
    )


def _is_a_page(path: Path) -> bool:
    try:
        return TITLE_END.encode() in path.read_bytes()[:LONGEST_HEAD]
    except OSError:
        return False


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts))


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["drawings"] = lambda chart: Markup("").join(map(Markup, drawings(chart)))
    return environment.get_template("page.html.jinja")
