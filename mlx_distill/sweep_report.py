"""The page of a sweep: what its runs say together → a Markdown file and one self-contained HTML page.

In: a `Swept`, whose rows `study.py` reads. Out: `report.md` and `report.html`. Decided here: what the headline says, which
condition the others are compared with, what is drawn against what. Every number comes from `study.py`; the look is in
`sweep.html.jinja`, curves and points are placed by `charts.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.charts import Chart, Level, Point, Scatter, Series, line_chart, scatter
from mlx_distill.evaluate import Difference
from mlx_distill.markdown import bullets, plain, table
from mlx_distill.report import RUN_ROLES, difference_sentence, page, write
from mlx_distill.scoring.intervals import Estimate
from mlx_distill.study import (
    BUDGETS,
    DONE,
    MATCHED,
    Condition,
    Row,
    best_within,
    conditions,
    difference,
    gain_retention,
    in_words,
    pareto_front,
    retention,
)
from mlx_distill.words import DASH, amount, counted, duration, number, percent, points

TEMPLATE = "sweep.html.jinja"
ENOUGH = 0.9  # the share of the full condition's accuracy that a headline calls kept
LESS = 0.9  # the share of its arithmetic from which on there is no saving to speak of
COSTS = {"flops": "arithmetic", "train_seconds": "time", "peak_bytes": "peak memory"}


@dataclass(frozen=True)
class Swept:
    """Everything the page is made from.

    name, question: of the sweep, in its author's words. axes: the values of each `table.field` that the grid crosses, {} where
    there are only arms. full: label and settings of the condition that differences and retentions relate to, None for the dearest.
    rows: students, finished or failed, and at most one row each of role "base" and "teacher"; those of a student in the grid
    have no label. planned: how many runs there are to be. teacher_pass: the teacher's kept answers, as {"sequences", "tokens",
    "bytes", "runs" (that read them)}, or {}.
    """

    name: str
    question: str
    axes: dict[str, list]
    full: tuple[str, dict[str, Any]] | None
    rows: list[Row]
    planned: int
    teacher_pass: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A number or name, and what qualifies it."""

    text: str
    small: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.small})" if self.small else self.text


@dataclass(frozen=True)
class Table:
    """Rows of cells; `align` has one letter a column, "l" or "r"."""

    head: list[str]
    rows: list[list[Cell]]
    align: str


@dataclass(frozen=True)
class Bar:
    """A condition's accuracy to draw, with the runs it is the mean of."""

    label: str
    remark: str
    role: str
    mean: float
    low: float
    high: float
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What the rows come to: conditions with their names on the page, the one the others relate to, what failed."""

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


def write_report(swept: Swept, out: Path) -> Path:
    """Write `report.md` and `report.html` into the folder `out`, made if need be; the path of the page.

    Raises `RunError` where they cannot be written and `DataError` where students answered different problems.
    """
    found = findings(swept)
    return write(markdown(found), html(found), _headline(found), out).html


def findings(swept: Swept) -> Findings:
    """Read the rows; models that answered other problems than the students did are left out."""
    students = conditions(swept.rows)
    problems = {row.problems for condition in students for row in condition.rows}
    shared = {}
    for role in ("base", "teacher"):
        alone = conditions(swept.rows, role)
        shared[role] = alone[0] if alone and (not problems or alone[0].rows[0].problems in problems) else None
    runs = [row for row in swept.rows if row.role == "student"]
    return Findings(
        swept, students, _names(students), _full(students, swept.full), shared["base"], shared["teacher"],
        [row for row in swept.rows if row.status != DONE], tuple(sorted({row.seed for row in runs})),
    )


def _names(students: Sequence[Condition]) -> list[str]:
    """Each condition's name, with its settings where several share a label."""
    plain_names = [condition.name for condition in students]
    return [
        name if plain_names.count(name) == 1 or not condition.label else f"{name}, {in_words(condition.settings)}"
        for name, condition in zip(plain_names, students, strict=True)
    ]


def _full(students: Sequence[Condition], named: tuple[str, dict[str, Any]] | None) -> Condition | None:
    """The named condition, None where it has not finished; without a name the dearest, rather of the grid than an arm."""
    if named is None:
        grid = [condition for condition in students if not condition.label]
        return max(grid or students, key=lambda condition: condition.cost("flops"), default=None)
    label, settings = named
    return next((one for one in students if one.label == label and one.settings.keys() == settings.keys()
                 and all(_same(one.settings[name], value) for name, value in settings.items())), None)


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are one value, a list from TOML being a tuple from Python."""
    return (list(a) == list(b)) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else a == b


# sentences


def headline(swept: Swept) -> str:
    """The first sentence: the cheapest condition that keeps most of the full one's accuracy, else the most accurate one."""
    return _headline(findings(swept))


def _headline(found: Findings) -> str:
    runs = sum(row.role == "student" for row in found.swept.rows)
    if not found.students:
        return f"{found.swept.name}: none of {counted(runs, 'run')} finished." if runs else f"{found.swept.name}: there is no run yet."
    kept = _cheapest_kept(found)
    if kept:
        return _kept_sentence(found, kept)
    best = max(found.students, key=lambda one: one.accuracy.mean)
    others = [one for one in found.students if one is not best]
    if not others:
        return f"{found.name(best)} solves {percent(best.accuracy.mean)} of {_problems(best)} problems ({_interval(best.accuracy)})."
    second = max(others, key=lambda one: one.accuracy.mean)
    return _difference_sentence(found, best, second) or (
        f"{found.name(best)} solves most, {percent(best.accuracy.mean)} of {_problems(best)} problems; "
        f"{found.name(second)} solves {percent(second.accuracy.mean)}, with other seeds."
    )


def _cheapest_kept(found: Findings) -> Condition | None:
    full = found.full
    for one in pareto_front(found.students) if full else []:
        share = retention(one, full)
        if one is not full and share and share.mean >= ENOUGH and 0 < one.cost("flops") <= LESS * full.cost("flops"):
            return one
    return None


def _kept_sentence(found: Findings, one: Condition) -> str:
    """What a condition keeps of the full one, and at what cost."""
    share = retention(one, found.full)
    return (f"{found.name(one)} keeps {percent(share.mean)} of the accuracy of {found.name(found.full)} ({_interval(share)}) "
            f"at {_ratio(one, found.full, 'flops')} of its arithmetic.")


def _short_sentence(found: Findings, one: Condition) -> str:
    """The same of another condition, the full one being named already; "" where they share no seed."""
    share = retention(one, found.full)
    return f"{found.name(one)} keeps {percent(share.mean)} ({_range(share)}) at {_ratio(one, found.full, 'flops')}." if share else ""


def _difference_sentence(found: Findings, a: Condition, b: Condition) -> str:
    gap = difference(a, b)
    if gap is None:
        return ""
    return difference_sentence(found.name(a), found.name(b), Difference(gap.mean, gap.low, gap.high, _problems(a), gap.verdict))


def leads(found: Findings) -> list[str]:
    """What follows the headline: the models that all runs share, the other members of the front, what is missing."""
    models = [
        f"{words} solves {percent(model.accuracy.mean)}"
        for words, model in (("the student before training", found.base), ("the teacher", found.teacher)) if model
    ]
    said = "; ".join(models)
    lines = [f"{said[0].upper()}{said[1:]}."] if said else []
    named = _cheapest_kept(found)
    if named:
        others = [_short_sentence(found, one) for one in pareto_front(found.students) if one not in (named, found.full)]
        lines += [*filter(None, others)]
    elif found.students and found.swept.full and found.full is None:
        label, settings = found.swept.full
        lines.append(f"No run of {label or in_words(settings)} has finished, so nothing is compared with it.")
    if found.most_seeds == 1:
        lines.append("One seed each: the intervals cover other problems only, not another seed.")
    if found.failed:
        lines.append(f"{counted(len(found.failed), 'run')} did not finish: see Failed runs.")
    if 0 < missing(found) < found.swept.planned:
        lines.append(f"{missing(found)} of {counted(found.swept.planned, 'run')} are still to come: this page describes the others.")
    return lines


def missing(found: Findings) -> int:
    """Runs that have neither finished nor failed."""
    return found.swept.planned - sum(row.role == "student" for row in found.swept.rows)


def notes(found: Findings) -> list[str]:
    """What the intervals and the costs on this page mean."""
    lines = []
    if found.most_seeds == 1:
        lines.append("Every condition was trained with one seed: intervals are 95\u00a0% and cover other problems only. How much another "
                     "seed would change a number, one seed cannot tell.")
    elif found.students:
        lines.append("Intervals are 95\u00a0% and cover another training seed and other problems together: the students of all seeds "
                     "answer the same problems, so seeds and problems are crossed. Conditions are compared over the seeds and problems "
                     "that both have, seed by seed and problem by problem.")
        if 1 < len({row.seed for condition in found.students for row in condition.rows}) < 4:
            lines.append("With two or three seeds that differ much, an interval covers somewhat less than it says.")
        if any(len(condition.rows) == 1 for condition in found.students):
            lines.append("Where a condition has one seed, its intervals cover other problems only.")
    shared = [words for words, model in (("the student before training", found.base), ("the teacher", found.teacher)) if model]
    if shared:
        lines.append(f"One model each, so that intervals cover other problems only: {' and '.join(shared)}.")
    if found.students:
        lines.append("Costs are means over seeds and count the training steps alone, without the teacher's shared pass, validation and "
                     "scoring; time is clock time of the training steps.")
        lines.append("KL is to the teacher, in nats per token, over held-out tokens of the supervised segments. An answer is well formed "
                     "where it closes its reasoning once and stops by itself.")
    if found.base and found.full:
        lines.append("The kept gain is (condition − before) / (full − before), full being "
                     f"{found.name(found.full)} and before the student before training.")
    return lines


def teacher_sentence(found: Findings) -> str:
    """The teacher's kept answers; "" without any."""
    took = found.swept.teacher_pass
    if not took:
        return ""
    return (f"{counted(took['runs'], 'run')} read the teacher's answers from a cache of {took['sequences']:,} sequences, "
            f"{amount(took['tokens'])} tokens, {amount(took['bytes'], 'B')}.")


def _interval(estimate: Estimate) -> str:
    return f"95\u00a0% interval {_range(estimate)}"


def _range(estimate: Estimate) -> str:
    return f"{percent(estimate.low)} to {percent(estimate.high)}"


def _problems(condition: Condition) -> int:
    return condition.right.shape[1]


def _ratio(one: Condition, other: Condition, cost: str) -> str:
    if not one.cost(cost) or not other.cost(cost):
        return DASH
    share = one.cost(cost) / other.cost(cost)
    return number(share, percent=True, places=0 if share >= 0.1 else 1)


# tables


def quality(found: Findings) -> Table:
    """One line a condition, those of the shared models first."""
    head = ["condition", "seeds", "accuracy", "points against full", "of full's accuracy", "of full's gain", "well formed", "KL"]
    shared = [(model, words) for model, words in ((found.base, "student before"), (found.teacher, "teacher")) if model]
    rows = [[Cell(words), Cell(DASH), _accuracy(model), *[Cell(DASH)] * 3, *_answers(model)] for model, words in shared]
    return Table(head, rows + [_quality_row(found, condition) for condition in found.students], "lrrrrrrr")


def _quality_row(found: Findings, one: Condition) -> list[Cell]:
    full, base = found.full, found.base
    if full is None or one is full:
        compared = [Cell(DASH), Cell(DASH), Cell(DASH)]
    else:
        gap = difference(one, full)
        compared = [
            Cell(points(gap.mean), f"{points(gap.low)} to {points(gap.high)}") if gap else Cell(DASH),
            _share(retention(one, full)), _share(gain_retention(one, full, base) if base else None),
        ]
    return [Cell(found.name(one), "full" if one is full else ""), _seeds(found, one), _accuracy(one), *compared, *_answers(one)]


def _seeds(found: Findings, one: Condition) -> Cell:
    missing = len(one.rows) < len(found.seeds)
    return Cell(f"{len(one.rows)} of {len(found.seeds)}" if missing else str(len(one.rows)))


def _accuracy(one: Condition) -> Cell:
    return Cell(percent(one.accuracy.mean), _range(one.accuracy))


def _share(estimate: Estimate | None) -> Cell:
    return Cell(percent(estimate.mean), _range(estimate)) if estimate else Cell(DASH)


def _answers(one: Condition) -> list[Cell]:
    measured = [row.kl for row in one.rows if math.isfinite(row.kl)]
    return [Cell(percent(one.cost("well_formed"))), Cell(number(float(np.mean(measured))) if measured else DASH)]


def costs(found: Findings) -> Table:
    """One line a condition; what was not measured is a dash."""
    head = ["condition", "tokens read", "FLOPs", "of full's FLOPs", "training time", "peak memory"]
    return Table(head, [_cost_row(found, condition) for condition in found.students], "lrrrrr")


def _cost_row(found: Findings, one: Condition) -> list[Cell]:
    def cell(name: str, text) -> Cell:
        value = one.cost(name)
        return Cell(text(value) if value else DASH)

    share = _ratio(one, found.full, "flops") if found.full else DASH
    return [
        Cell(found.name(one)), cell("tokens_read", amount), cell("flops", lambda value: amount(value, "FLOP")), Cell(share),
        cell("train_seconds", duration), cell("peak_bytes", lambda value: amount(value, "B")),
    ]


def budgets(found: Findings) -> Table:
    """The best condition for each share of the dearest one's FLOPs; no line where no FLOPs are known."""
    dearest = max(found.students, key=lambda one: one.cost("flops"), default=None)
    rows = []
    for share in BUDGETS if dearest and dearest.cost("flops") else ():
        best, budget = best_within(found.students, share), number(share, percent=True, places=0)
        rows.append(
            [Cell(budget), Cell(found.name(best)), _accuracy(best), Cell(_ratio(best, dearest, "flops")), Cell(best_path(share))] if best
            else [Cell(budget), Cell("no condition costs this little"), *[Cell(DASH)] * 3]
        )
    return Table(["budget", "best condition", "accuracy", "its cost", "recipe"], rows, "rlrrl")


def best_path(share: float) -> str:
    """Where a sweep keeps the recipe of the best condition for a budget, from its folder."""
    return f"best/budget-{share:.2f}.toml"


def failures(found: Findings) -> Table:
    """The runs without a result and why."""
    rows = [
        [Cell(row.run, f"{row.label or in_words(row.settings) or row.role}, seed {row.seed}"), Cell(row.status)] for row in found.failed
    ]
    return Table(["run", "why"], rows, "ll")


# figures


def x_axis(swept: Swept) -> str | None:
    """The first axis of at least two numbers."""
    for field, values in swept.axes.items():
        if len({*map(str, values)}) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return field
    return None


def curves(found: Findings) -> list[tuple[str, list[Condition]]]:
    """(label, conditions by x) for each curve against the x axis: the grid's by its other axes, then arms that have points of x."""
    x = x_axis(found.swept)
    if x is None:
        return []
    others = [field for field in found.swept.axes if field != x]
    combinations = [dict(zip(others, values, strict=True)) for values in product(*(found.swept.axes[field] for field in others))]
    labels = ["", *dict.fromkeys(condition.label for condition in found.students if condition.label)]
    drawn = []
    for label in labels:
        for settings in combinations:
            members = [
                one for one in found.students if one.label == label and x in one.settings
                and all(_same(one.settings.get(field), value) for field, value in settings.items())
            ]
            if members and (len(members) > 1 or label in ("", MATCHED)):
                words = ", ".join(filter(None, (label, in_words(settings))))
                drawn.append((words or "grid", sorted(members, key=lambda one: one.settings[x])))
    return [("accuracy", members) for _, members in drawn] if len(drawn) == 1 else drawn


def quality_chart(found: Findings) -> Chart | None:
    """Accuracy against the x axis, with bands, and single runs as dots where there are several seeds."""
    x = x_axis(found.swept)
    series = []
    for i, (label, members) in enumerate(curves(found)):
        at = [one.settings[x] for one in members]
        known = [one.accuracy for one in members]
        dots = [(one.settings[x], row.accuracy) for one in members if len(one.rows) > 1 for row in one.rows]
        series.append(Series(
            label, _role(i), at, [one.mean for one in known], low=[one.low for one in known], high=[one.high for one in known], dots=dots,
            dashed=i >= len(RUN_ROLES),
        ))
    if not series:
        return None
    levels = [Level("student before", "base", found.base.accuracy.mean)] if found.base else []
    levels += [Level(f"full: {found.name(found.full)}", "teacher", found.full.accuracy.mean)] if found.full else []
    unit = "share of problems, 95\u00a0% band" + (", one dot a run" if any(one.dots for one in series) else "")
    return line_chart(
        "Accuracy", unit, series, percent=True, x_name=x.rpartition(".")[2], x_values=found.swept.axes[x], levels=levels, from_zero=False,
    )


def cost_chart(found: Findings) -> Chart | None:
    """Costs of the first curve against the x axis, as shares of those at its largest x."""
    x, drawn = x_axis(found.swept), curves(found)
    if not drawn or drawn[0][1][0].label or len(drawn[0][1]) < 2:
        return None
    members = drawn[0][1]
    series = [
        Series(words, _role(i), [one.settings[x] for one in members], [one.cost(name) / members[-1].cost(name) for one in members])
        for i, (name, words) in enumerate(COSTS.items()) if members[-1].cost(name)
    ]
    of = f"share of that at {in_words({x: members[-1].settings[x]})}"
    return line_chart("Cost", of, series, percent=True, x_name=x.rpartition(".")[2], x_values=found.swept.axes[x])


def bars(found: Findings) -> list[Bar]:
    """Accuracy by condition in the order given, for sweeps without an axis of numbers."""
    if x_axis(found.swept) or not found.students:
        return []
    models = [(found.base, "student before", "base"), *[(one, found.name(one), "accent") for one in found.students],
              (found.teacher, "teacher", "teacher")]
    return [_bar(one, label, role) for one, label, role in models if one]


def _bar(one: Condition, label: str, role: str) -> Bar:
    known, several = one.accuracy, len(one.rows) > 1
    return Bar(label, counted(len(one.rows), "seed") if several else "", role, known.mean, known.low, known.high,
               tuple(row.accuracy for row in one.rows) if several else ())


def pareto_chart(found: Findings) -> Scatter | None:
    """Accuracy against FLOPs; the conditions that no cheaper one beats are joined."""
    front = pareto_front(found.students)
    roles = {id(one): _role(i) for i, (_, members) in enumerate(curves(found)) for one in members}
    marks = [
        Point(found.name(one), roles.get(id(one), "accent" if not roles else "compared"), one.cost("flops"),
              one.accuracy.mean, one.accuracy.low, one.accuracy.high, one in front)
        for one in found.students if one.cost("flops") > 0
    ]
    return scatter("Accuracy against cost", "share of problems, 95\u00a0% interval", marks, "arithmetic of the training steps",
                   lambda flops: amount(flops, "FLOP"))


def _role(i: int) -> str:
    return RUN_ROLES[i % len(RUN_ROLES)]


# page


def html(found: Findings) -> str:
    """The page, complete in itself; all text of the sweep is escaped."""
    return page(
        TEMPLATE, swept=found.swept, headline=_headline(found), leads=leads(found), notes=notes(found),
        teacher_pass=teacher_sentence(found), quality=quality(found), costs=costs(found), budgets=budgets(found),
        failures=failures(found), chart=quality_chart(found), costs_chart=cost_chart(found), bars=bars(found),
        pareto=pareto_chart(found), students=len(found.students), amount=amount,
        runs=sum(row.role == "student" for row in found.swept.rows), seeds=len(found.seeds),
    )


def markdown(found: Findings) -> str:
    """The page's words and tables as Markdown."""
    blocks = [f"# {plain(_headline(found))}", plain(found.swept.question), *map(plain, leads(found))]
    sections = [
        ("Quality", quality(found)), ("Cost", costs(found)), ("Best condition for each budget", budgets(found)),
        ("Failed runs", failures(found)),
    ]
    for title, content in sections:
        if not content.rows:
            continue
        blocks += [f"## {title}", table(content.head, [[*map(str, row)] for row in content.rows], content.align)]
        if title == "Cost":
            blocks.append(plain(teacher_sentence(found)))
    blocks += ["## How to read this", bullets(notes(found))] if notes(found) else []
    return "\n\n".join(filter(None, blocks)).replace("\u00a0", " ") + "\n"
