"""What the rows of a sweep come to: conditions with their names on the page, and the one that the
others relate to.

In: a `Swept`, whose rows `study.py` reads. Out: `Findings`. Decided here: which condition is the
full one, which models are left out, and which condition the headline is about.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlx_distill.reporting.condition_words import in_words
from mlx_distill.reporting.study import (
    DONE,
    Condition,
    Row,
    conditions,
    pareto_front,
    retention,
    worth_training,
)
from mlx_distill.scoring.intervals import Estimate

ENOUGH = 0.9  # the share of the full condition's accuracy that a headline calls kept
LESS = 0.9  # the share of its arithmetic from which on there is no saving to speak of
TIE = (
    0.05  # an interval around zero that is this narrow says that there is no difference to speak of
)
FEW_SEEDS = 5  # fewer than these are drawn with error bars, not joined to a band


@dataclass(frozen=True)
class Places:
    """Where a run's page, recipe and log lie, as addresses from the page; "" for what is absent."""

    page: str = ""
    recipe: str = ""
    log: str = ""


@dataclass(frozen=True)
class Swept:
    """Everything the page is made from.

    name, question: of the sweep, in its author's words. axes: the values of each `table.field` that
    the grid crosses, {} where there are only arms. full: label and settings of the condition that
    differences and retentions relate to, None for the dearest. rows: students, finished or failed,
    and at most one row each of role "base" and "teacher"; those of a student in the grid have no
    label. planned: how many runs there are to be. teacher_pass: the teacher's kept answers, as
    {"sequences", "tokens", "bytes", "runs" (that read them)}, or {}. places: of each run, by its
    name. results: the address of all rows, "" where they are not kept.
    """

    name: str
    question: str
    axes: dict[str, list]
    full: tuple[str, dict[str, Any]] | None
    rows: list[Row]
    planned: int
    teacher_pass: dict[str, Any]
    places: Mapping[str, Places] = field(default_factory=dict)
    results: str = ""

    def place(self, run: str) -> Places:
        return self.places.get(run, Places())


@dataclass(frozen=True)
class Findings:
    """What the rows come to: conditions with their names on the page, the one the others relate to,
    what failed.
    """

    swept: Swept
    students: list[Condition]
    names: list[str]
    full: Condition | None
    base: Condition | None
    teacher: Condition | None
    failed: list[Row]
    seeds: tuple[int, ...]

    def name(self, condition: Condition) -> str:
        return self._name_of[condition.key]

    @cached_property
    def _name_of(self) -> dict[str, str]:
        return {one.key: name for one, name in zip(self.students, self.names, strict=True)}

    @property
    def most_seeds(self) -> int:
        return max((len(condition.rows) for condition in self.students), default=0)


def findings(swept: Swept) -> Findings:
    """Read the rows; models that answered other problems than the students did are left out."""
    students = conditions(swept.rows)
    runs = [row for row in swept.rows if row.role == "student"]
    return Findings(
        swept,
        students,
        _names(students),
        _full(students, swept.full),
        shared_model(swept.rows, "base"),
        shared_model(swept.rows, "teacher"),
        [row for row in swept.rows if row.status != DONE],
        tuple(sorted({row.seed for row in runs})),
    )


def shared_model(rows: Sequence[Row], role: str) -> Condition | None:
    """The base or the teacher that every run shares; None where it was not scored, or on other
    problems than the students.
    """
    problems = {row.problems for row in rows if row.role == "student" and row.status == DONE}
    alone = conditions(rows, role)
    known = alone and (not problems or alone[0].rows[0].problems in problems)
    return alone[0] if known else None


def _names(students: Sequence[Condition]) -> list[str]:
    """Each condition's name, with its settings where several share a label."""
    plain_names = [condition.name for condition in students]
    times = Counter(plain_names)
    return [
        name
        if times[name] == 1 or not condition.label
        else f"{name}, {in_words(condition.settings)}"
        for name, condition in zip(plain_names, students, strict=True)
    ]


def _full(
    students: Sequence[Condition], named: tuple[str, dict[str, Any]] | None
) -> Condition | None:
    """The named condition, None where it has not finished; without a name the dearest, rather of
    the grid than an arm.
    """
    if named is None:
        grid = [condition for condition in students if not condition.label]
        return max(grid or students, key=lambda condition: condition.cost("flops"), default=None)
    label, settings = named
    return next(
        (
            one
            for one in students
            if one.label == label
            and one.settings.keys() == settings.keys()
            and all(same(one.settings[name], value) for name, value in settings.items())
        ),
        None,
    )


def same(a: Any, b: Any) -> bool:
    """Whether two settings are one value, a list from TOML being a tuple from Python."""
    return (
        (list(a) == list(b))
        if isinstance(a, list | tuple) and isinstance(b, list | tuple)
        else a == b
    )


def worthy(found: Findings) -> list[Condition]:
    """The conditions that beat the undistilled student; all of them where it was not scored."""
    return worth_training(found.students, found.base)


def nothing_beats_the_base(found: Findings) -> bool:
    """Whether the undistilled student is the one to keep, as far as this sweep tells."""
    return bool(found.students and found.base and not worthy(found))


def wider_than_its_claim(share: Estimate) -> bool:
    """Whether the interval of a share tells less than the share seems to say."""
    return share.high - share.low > max(abs(share.mean), TIE)


def undecided(gap: Estimate) -> bool:
    """Whether the interval of a difference holds zero and differences that would matter."""
    return gap.low <= 0 <= gap.high and gap.high - gap.low > TIE


def cheapest_kept(found: Findings) -> Condition | None:
    """The cheapest condition that keeps most of the full one's accuracy, where that is a saving and
    the interval does not leave it open.
    """
    full = found.full
    if full is None or full not in (good := worthy(found)):
        return None
    for one in pareto_front(good):
        share = retention(one, full)
        if (
            one is not full
            and share
            and share.mean >= ENOUGH
            and not wider_than_its_claim(share)
            and 0 < one.cost("flops") <= LESS * full.cost("flops")
        ):
            return one
    return None


def missing(found: Findings) -> int:
    """Runs that have neither finished nor failed."""
    return found.swept.planned - sum(row.role == "student" for row in found.swept.rows)
