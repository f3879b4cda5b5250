"""How far the children of a sweep are: the last line of progress in each one's log → a view.

In: jobs that run, each with its log. Out: what the view says of them. Decided here: a child's own
bar is shown for work that is done once for all; of a run among others one line, and without a
terminal a line each quarter of its work.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.sweeps.jobs import Job
from mlx_distill.view import Counter, View

LINE = re.compile(
    r"(?P<label>\S[^\n]*?) (?P<done>\d+)/(?P<total>\d+)(?P<left>  left [^\n]*?)?(  .*)?"
)
TAIL = 4_000  # bytes of a log that hold its last line of progress
QUARTERS = 4


@dataclass(frozen=True)
class At:
    """What a child is at: "training", 50 of 100, "left 12 s" or ""."""

    label: str
    done: int
    total: int
    left: str

    def __str__(self) -> str:
        return "  ".join(filter(None, (f"{self.label} {self.done}/{self.total}", self.left)))


def last_progress(log: Path) -> At | None:
    """The last line of a log that counts something; None where none does, or there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if found := LINE.fullmatch(line):
            done, total = int(found["done"]), int(found["total"])
            return At(found["label"], done, total, (found["left"] or "").strip())
    return None


class Runs:
    """What each of some runs is at, under its name in words."""

    def __init__(self, view: View, names: dict[Job, str]):
        self.view, self.names = view, names
        self._told: dict[Job, tuple[str, int]] = {}
        self._seen: dict[Job, At] = {}

    def __call__(self, job: Job) -> None:
        at = last_progress(job.log)
        if at is None or at == self._seen.get(job):
            return
        self._seen[job] = at
        quarter = at.label, at.done * QUARTERS // max(1, at.total)
        news = 0 < quarter[1] < QUARTERS and quarter != self._told.get(job)
        if news:
            self._told[job] = quarter
        self.view.doing(f"{self.names[job]}: {at}", news)


class Mirror:
    """The bar of the one child that runs."""

    def __init__(self, view: View):
        self.view = view
        self._counter: Counter | None = None
        self._at: At | None = None

    def __call__(self, job: Job) -> None:
        at = last_progress(job.log)
        if at is None or at == self._at:
            return
        before = self._at
        if before is None or (before.label, before.total) != (at.label, at.total):
            if at.done >= at.total:
                return
            self._counter, before = self.view.count(at.label, at.total, at.done), at
            self.view.doing(str(at), news=True)
        assert self._counter is not None
        self._counter(at.done - before.done)
        self._at = at
