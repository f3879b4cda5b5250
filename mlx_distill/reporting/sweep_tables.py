"""The tables of a sweep's page: quality, cost, the best condition for each budget, failed runs.

In: `Findings`. Out: `Table`s. What was not measured is a dash.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from mlx_distill.reporting.condition_words import capital, in_words
from mlx_distill.reporting.study import (
    BUDGETS,
    Condition,
    Row,
    best_within,
    difference,
    gain_retention,
    retention,
)
from mlx_distill.reporting.sweep_findings import Findings, undecided, wider_than_its_claim
from mlx_distill.reporting.sweep_words import TOO_FEW, range_of, ratio
from mlx_distill.reporting.table import Cell, Link, Table
from mlx_distill.scoring.intervals import Estimate
from mlx_distill.words import DASH, amount, duration, number, percent, points


def quality(found: Findings) -> Table:
    """One line a condition, those of the shared models first."""
    head = [
        "condition",
        "seeds",
        "accuracy",
        "points against full",
        "of full's accuracy",
        "of full's gain",
        "well formed",
        "KL",
    ]
    shared = [
        (model, words)
        for model, words in ((found.base, "student before"), (found.teacher, "teacher"))
        if model
    ]
    rows = [
        [Cell(words), Cell(DASH), _accuracy(model), *[Cell(DASH)] * 3, *_answers(model)]
        for model, words in shared
    ]
    return Table(
        head, rows + [_quality_row(found, condition) for condition in found.students], "lrrrrrrr"
    )


def _quality_row(found: Findings, one: Condition) -> list[Cell]:
    full, base = found.full, found.base
    if full is None or one is full:
        compared = [Cell(DASH), Cell(DASH), Cell(DASH)]
    else:
        gap = difference(one, full)
        compared = [
            _gap(gap),
            _share(retention(one, full)),
            _share(gain_retention(one, full, base) if base else None),
        ]
    return [
        Cell(capital(found.name(one)), "full" if one is full else ""),
        _seeds(found, one),
        _accuracy(one),
        *compared,
        *_answers(one),
    ]


def _seeds(found: Findings, one: Condition) -> Cell:
    missing = len(one.rows) < len(found.seeds)
    return Cell(f"{len(one.rows)} of {len(found.seeds)}" if missing else str(len(one.rows)))


def every_run(found: Findings) -> Table:
    """Each finished run with its page, its recipe and its log; no line where none of them is
    known."""
    rows = []
    for one in found.students:
        for row in one.rows:
            place = found.swept.place(row.run)
            links = ("page", place.page), ("recipe", place.recipe), ("log", place.log)
            known = tuple(Link(text, address) for text, address in links if address)
            cells = [
                Cell(capital(found.name(one))),
                Cell(str(row.seed)),
                Cell(percent(row.accuracy)),
            ]
            rows.append([*cells, Cell("", links=known)])
    linked = [row for row in rows if row[-1].links]
    return Table(["condition", "seed", "accuracy", "files"], linked, "lrrl")


def _accuracy(one: Condition) -> Cell:
    return Cell(percent(one.accuracy.mean), range_of(one.accuracy))


def _gap(gap: Estimate | None) -> Cell:
    if gap is None:
        return Cell(DASH)
    bounds = f"{points(gap.low)} to {points(gap.high)}"
    if undecided(gap):
        return Cell(TOO_FEW, f"{points(gap.mean)}, {bounds}", look="unsure")
    return Cell(points(gap.mean), bounds)


def _share(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(DASH)
    if wider_than_its_claim(estimate):
        return Cell(TOO_FEW, f"{percent(estimate.mean)}, {range_of(estimate)}", look="unsure")
    return Cell(percent(estimate.mean), range_of(estimate))


def _answers(one: Condition) -> list[Cell]:
    measured = [row.kl for row in one.rows if math.isfinite(row.kl)]
    return [
        Cell(percent(one.cost("well_formed"))),
        Cell(number(float(np.mean(measured))) if measured else DASH),
    ]


def costs(found: Findings) -> Table:
    """One line a condition; what was not measured is a dash."""
    head = ["condition", "tokens read", "FLOPs", "of full's FLOPs", "training time", "peak memory"]
    return Table(head, [_cost_row(found, condition) for condition in found.students], "lrrrrr")


def _cost_row(found: Findings, one: Condition) -> list[Cell]:
    def cell(name: str, text: Callable[[float], str]) -> Cell:
        value = one.cost(name)
        return Cell(text(value) if value else DASH)

    share = ratio(one, found.full, "flops") if found.full else DASH
    return [
        Cell(capital(found.name(one))),
        cell("tokens_read", amount),
        cell("flops", lambda value: amount(value, "FLOP")),
        Cell(share),
        cell("train_seconds", duration),
        cell("peak_bytes", lambda value: amount(value, "B")),
    ]


def budgets(found: Findings) -> Table:
    """The best condition for each share of the dearest one's FLOPs, budgets with the same answer in
    one line; no line where no FLOPs are known, or nothing beats the undistilled student.
    """
    dearest = max(found.students, key=lambda one: one.cost("flops"), default=None)
    best = {share: best_within(found.students, share, found.base) for share in BUDGETS}
    rows = []
    if dearest and dearest.cost("flops") and any(best.values()):
        for one, same in groupby(BUDGETS, best.__getitem__):
            rows.append(_budget_row(found, one, list(same), dearest))
    return Table(
        ["budget", "best condition", "accuracy", "its cost", "recipe"], rows, "rlrrl", look="budget"
    )


def _budget_row(
    found: Findings, best: Condition | None, budgets: Sequence[float], dearest: Condition
) -> list[Cell]:
    said = [number(share, percent=True, places=0) for share in budgets]
    budget = Cell(said[0] if len(said) == 1 else f"{said[0]} to {said[-1]}")
    if best is None:
        most = max(budgets) * dearest.cost("flops")
        cheap = any(0 < one.cost("flops") <= most for one in found.students)
        why = "nothing that costs this little beats the student before training"
        return [
            budget,
            Cell(why if cheap else "no condition costs this little"),
            *[Cell(DASH)] * 3,
        ]
    path = best_path(budgets[0])
    return [
        budget,
        Cell(capital(found.name(best))),
        _accuracy(best),
        Cell(ratio(best, dearest, "flops")),
        Cell("", links=(Link(path, path),)) if found.swept.results else Cell(path),
    ]


def best_path(share: float) -> str:
    """Where a sweep keeps the recipe of the best condition for a budget, from its folder."""
    return f"best/budget-{share:.2f}.toml"


def failures(found: Findings) -> Table:
    """The runs without a result and why."""
    rows = [[_failed_run(found, row), Cell(row.status)] for row in found.failed]
    return Table(["run", "why"], rows, "ll", look="failed")


def _failed_run(found: Findings, row: Row) -> Cell:
    what = capital(row.label or in_words(row.settings) or row.role)
    log = found.swept.place(row.run).log
    links = (Link("log", log),) if log else ()
    return Cell(f"{what}, seed {row.seed}", row.run, links=links)
