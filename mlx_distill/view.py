"""What a person sees while a run goes: a live bar on a terminal, plain lines elsewhere. Decides nothing."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 20  # plain lines printed over a whole run, about


class View:
    """Prints to `console`. Use as a context manager, so that the live bar is closed whatever happens."""

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None
        self._total = 0

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def say(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, total: int, done: int) -> None:
        """Training begins, `done` of `total` steps are behind it."""
        self._open("training", total, done)

    def step(self, row: dict) -> None:
        """A row of metrics.jsonl."""
        names = ("loss",) if self._bar else ("loss", "kd", "ce")  # a live bar has to fit 80 columns
        text = "  ".join(f"{name} {row[name]:.4f}" for name in names if name in row) + f"  {row['tokens_per_second']:,.0f} tok/s"
        text += "" if self._bar else f"  peak {row['peak_bytes'] / 1e9:.2f} GB"
        self._advance(1, row["step"], text)

    def validation(self, row: dict) -> None:
        """A row of validation.jsonl."""
        names = ("ce_cot", "kl_cot", "agree_cot", "ce_answer", "kl_answer")
        terms = "  ".join(f"{name} {row[name]:.4f}" for name in names if name in row)
        self.say(f"validation after step {row['step']}: loss {row['loss']:.4f}  {terms}")

    def count(self, label: str, total: int) -> "Counter":
        """A bar (or lines) for `total` pieces of other work; call the result with how many more are done."""
        self._close()
        self._open(label, total, 0)
        return Counter(self)

    def _open(self, label: str, total: int, done: int) -> None:
        self._label, self._total, self._done, self._started = label, total, done, time.perf_counter()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(compact=True), TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, text="")

    def _advance(self, by: int, done: int, text: str) -> None:
        before, self._done = self._done, done
        if self._bar:
            self._bar.update(self._task, advance=by, text=text)
        elif done >= self._total or done * LINES // self._total > before * LINES // self._total:
            self.say(f"{self._label} {done}/{self._total}  {text}".rstrip())
        if done >= self._total:
            self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class Counter:
    """Counts finished pieces into a `View`."""

    def __init__(self, view: View):
        self._view = view

    def __call__(self, more: int) -> None:
        if more:
            self._view._advance(more, self._view._done + more, "")


def silent() -> View:
    """For the ranks that are not the first."""
    return View(Console(quiet=True))
