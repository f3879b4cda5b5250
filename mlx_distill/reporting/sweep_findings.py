"""What the rows of a sweep come to: conditions with their names on the page, and the one that the
others relate to.

In: a `Swept`, whose rows `study.py` reads. Out: `Findings`. Decided here: which condition is the
full one, which models are left out, and which condition the headline is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.reporting.study import (
    DONE,
    Condition,
    Row,
    conditions,
    in_words,
    pareto_front,
    retention,
)

ENOUGH = 0.9  # the share of the full condition's accuracy that a headline calls kept
LESS = 0.9  # the share of its arithmetic from which on there is no saving to speak of


@dataclass(frozen=True)
class Swept:
    """Everything the page is made from.

    name, question: of the sweep, in its author's words. axes: the values of each `table.field` that
    the grid crosses, {} where there are only arms. full: label and settings of the condition that
    differences and retentions relate to, None for the dearest. rows: students, finished or failed,
    and at most one row each of role "base" and "teacher"; those of a student in the grid have no
    label. planned: how many runs there are to be. teacher_pass: the teacher's kept answers, as
    {"sequences", "tokens", "bytes", "runs" (that read them)}, or {}.
    """

    name: str
    question: str
    axes: dict[str, list]
    full: tuple[str, dict[str, Any]] | None
    rows: list[Row]
    planned: int
    teacher_pass: dict[str, Any]


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
        return self.names[self.students.index(condition)]

    @property
    def most_seeds(self) -> int:
        return max((len(condition.rows) for condition in self.students), default=0)


def findings(swept: Swept) -> Findings:
    """Read the rows; models that answered other problems than the students did are left out."""
    students = conditions(swept.rows)
    problems = {row.problems for condition in students for row in condition.rows}
    shared = {}
    for role in ("base", "teacher"):
        alone = conditions(swept.rows, role)
        shared[role] = (
            alone[0] if alone and (not problems or alone[0].rows[0].problems in problems) else None
        )
    runs = [row for row in swept.rows if row.role == "student"]
    return Findings(
        swept,
        students,
        _names(students),
        _full(students, swept.full),
        shared["base"],
        shared["teacher"],
        [row for row in swept.rows if row.status != DONE],
        tuple(sorted({row.seed for row in runs})),
    )


def _names(students: Sequence[Condition]) -> list[str]:
    """Each condition's name, with its settings where several share a label."""
    plain_names = [condition.name for condition in students]
    return [
        name
        if plain_names.count(name) == 1 or not condition.label
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


def cheapest_kept(found: Findings) -> Condition | None:
    """The cheapest condition that keeps most of the full one's accuracy, where that is a saving."""
    full = found.full
    if full is None:
        return None
    for one in pareto_front(found.students):
        share = retention(one, full)
        if (
            one is not full
            and share
            and share.mean >= ENOUGH
            and 0 < one.cost("flops") <= LESS * full.cost("flops")
        ):
            return one
    return None


def missing(found: Findings) -> int:
    """Runs that have neither finished nor failed."""
    return found.swept.planned - sum(row.role == "student" for row in found.swept.rows)
