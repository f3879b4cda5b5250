"""What a person sees while a run goes: a live bar on a terminal, plain lines elsewhere.

Decided here: that a line is folded between its fields, how the time that is left is told, and
that a terminal only ever shows text and never obeys it. Whatever is printed passes
`plain`, on a `Screen` or in an error's line, so that no name, path or row of data can move the
cursor, set a title or turn a line around.
"""

import codecs
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.segment import Segment

from mlx_distill.words import duration

LINES = 20  # plain lines printed over a whole run, about
BAR = 16  # columns of a live bar
BETWEEN = "  "  # fields
# C0 but for tab and line feed, DEL, C1; marks that turn text around; line separators; halves of
# characters; tags
OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
NEAREST = {
    "×": "x",
    "·": "-",
    "…": "...",
    "→": "->",
    "–": "-",
    "—": "-",
    "⟦": "[",
    "⟧": "]",
    "−": "-",
    "≈": "~",
    "“": '"',
    "”": '"',
}


def plain(text: str) -> str:
    """The text with every character written out (`\\x1b`) that a terminal would obey and not show."""
    return OBEYED.sub(lambda found: _written_out(found[0]), text)


def one_line(text: str) -> str:
    """The same, with the ends of lines written out too."""
    return plain(text).replace("\n", "\\n")


def _written_out(letter: str) -> str:
    code = ord(letter)
    return (
        "\\r"
        if letter == "\r"
        else f"\\x{code:02x}"
        if code < 256
        else f"\\u{code:04x}"
        if code < 65_536
        else f"\\U{code:08x}"
    )


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """For a stream that cannot show a character: the nearest that ASCII has, or "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(map(_ascii, found)), error.end


def _ascii(letter: str) -> str:
    base = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return NEAREST.get(letter) or base or "?"


codecs.register_error("nearest", _nearest)


def show_what_can_be_shown() -> None:
    """From here on stdout and stderr take any text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="nearest")


class Screen(Console):
    """A console on which text is text: no markup, no emoji codes, and nothing that a terminal obeys
    but our own colours.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


class View:
    """Prints to `console`. Use as a context manager, so that the live bar is closed whatever
    happens. clock: seconds, for the time that is left.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self._bar: Progress | None = None
        self._pace = Pace(0, 0, 0.0)

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def say(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

    def say_fields(self, fields: Sequence[str]) -> None:
        """What belongs together on one line, on as many as it needs: a field is never cut."""
        for line in folded(fields, self.console.width):
            self.say(line)

    def start(self, total: int, done: int) -> None:
        """Training begins, `done` of `total` steps are behind it."""
        self._open("training", Pace(total, done, None))

    def step(self, step: int, numbers: Mapping[str, float], terms: Iterable[str]) -> None:
        """What a training step measured, and the names of the terms that make the loss."""
        names = ("loss",) if self._bar else ("loss", *terms)  # a live bar has to fit 80 columns
        rate = numbers.get("tokens_per_second")
        fields = [*_named(names, numbers), *([f"{rate:,.0f} tok/s"] if rate else [])]
        memory = [] if self._bar else [f"peak {numbers['peak_bytes'] / 1e9:.2f} GB"]
        self._advance(1, step, [*fields, *memory])

    def validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """What the held-out sequences cost after a step."""
        terms = [name for name in numbers if name.endswith(("_cot", "_answer"))]
        names = ("loss", *(name for name in terms if "tokens" not in name))
        first, *others = _named(names, numbers)
        self.say_fields([f"validation after step {step}: {first}", *others])

    def count(self, label: str, total: int, done: int = 0) -> "Counter":
        """A bar (or lines) for `total` pieces of other work, of which `done` were done before
        anybody looked; call the result with how many more are.
        """
        self._close()
        self._open(label, Pace(total, done, self.clock()))
        return Counter(self)

    def doing(self, text: str, news: bool) -> None:
        """What the piece in work is at: beside the bar, else a line where it is `news`."""
        if self._bar:
            self._bar.update(self._task, text=self._fitting([text]))
        elif news:
            self.say(text)

    def _open(self, label: str, pace: "Pace") -> None:
        self._label, self._done, self._pace = label, pace.done, pace
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=BAR),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(
                label, total=pace.total, completed=pace.done, left="", text=""
            )

    def _advance(self, by: int, done: int, fields: Sequence[str]) -> None:
        before, self._done, total = self._done, done, self._pace.total
        left = self._pace.left(done, self.clock())
        if self._bar:
            self._bar.update(self._task, advance=by, left=left)
            self._bar.update(self._task, text=self._fitting(fields))
        elif done >= total or done * LINES // total > before * LINES // total:
            times = [left] if left else []
            self.say_fields([f"{self._label} {done}/{total}", *times, *fields])
        if done >= total:
            self._close()

    def _fitting(self, fields: Sequence[str]) -> str:
        """As many of the fields as stand beside the bar in one line."""
        assert self._bar is not None
        task = self._bar.tasks[0]
        counted = len(f"{task.description} {task.total}/{task.total} {task.fields['left']} ")
        room = self.console.width - counted - BAR - 2
        line = folded([plain(field) for field in fields], room)[0] if fields else ""
        return line if len(line) <= room else f"{line[: max(0, room - 1)]}…"

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


@dataclass
class Pace:
    """How long pieces take: `total` of them, `done` when work began, at `since` seconds; None where
    the first piece takes longer than the others, which are counted alone then.
    """

    total: int
    done: int
    since: float | None

    def left(self, done: int, now: float) -> str:
        """The time that the others will take; "" while nothing tells."""
        if self.since is None:
            self.done, self.since = done, now
        made = done - self.done
        if made <= 0 or done >= self.total:
            return ""
        return f"left {duration((now - self.since) / made * (self.total - done))}"


def folded(fields: Sequence[str], width: int) -> list[str]:
    """Fields joined to lines of `width` at most, as far as a field is no longer; those after the
    first are indented.
    """
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + len(BETWEEN) + len(field) <= width:
            lines[-1] += BETWEEN + field
        else:
            lines.append(f"{BETWEEN}{field}" if lines else field)
    return lines


def _named(names: Iterable[str], numbers: Mapping[str, float]) -> list[str]:
    """Those of the numbers that there are."""
    return [f"{name} {numbers[name]:.4f}" for name in names if name in numbers]


class Counter:
    """Counts finished pieces into a `View`."""

    def __init__(self, view: View):
        self._view = view

    def __call__(self, more: int) -> None:
        if more:
            self._view._advance(more, self._view._done + more, [])


def silent() -> View:
    """For the ranks that are not the first."""
    return View(Screen(quiet=True))
