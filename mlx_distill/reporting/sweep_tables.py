"""The tables of a sweep's page: quality, cost, the best condition for each budget, failed runs.

In: `Findings`. Out: `Table`s. What was not measured is a dash.
"""

import math
from collections.abc import Callable

import numpy as np

from mlx_distill.reporting.page import Cell, Table
from mlx_distill.reporting.study import (
    BUDGETS,
    Condition,
    best_within,
    difference,
    gain_retention,
    in_words,
    retention,
)
from mlx_distill.reporting.sweep_findings import Findings
from mlx_distill.reporting.sweep_words import range_of, ratio
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
            Cell(points(gap.mean), f"{points(gap.low)} to {points(gap.high)}")
            if gap
            else Cell(DASH),
            _share(retention(one, full)),
            _share(gain_retention(one, full, base) if base else None),
        ]
    return [
        Cell(found.name(one), "full" if one is full else ""),
        _seeds(found, one),
        _accuracy(one),
        *compared,
        *_answers(one),
    ]


def _seeds(found: Findings, one: Condition) -> Cell:
    missing = len(one.rows) < len(found.seeds)
    return Cell(f"{len(one.rows)} of {len(found.seeds)}" if missing else str(len(one.rows)))


def _accuracy(one: Condition) -> Cell:
    return Cell(percent(one.accuracy.mean), range_of(one.accuracy))


def _share(estimate: Estimate | None) -> Cell:
    return Cell(percent(estimate.mean), range_of(estimate)) if estimate else Cell(DASH)


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
        Cell(found.name(one)),
        cell("tokens_read", amount),
        cell("flops", lambda value: amount(value, "FLOP")),
        Cell(share),
        cell("train_seconds", duration),
        cell("peak_bytes", lambda value: amount(value, "B")),
    ]


def budgets(found: Findings) -> Table:
    """The best condition for each share of the dearest one's FLOPs; no line where no FLOPs are
    known.
    """
    dearest = max(found.students, key=lambda one: one.cost("flops"), default=None)
    rows = []
    for share in BUDGETS:
        if dearest is None or not dearest.cost("flops"):
            break
        best, budget = best_within(found.students, share), number(share, percent=True, places=0)
        rows.append(
            [
                Cell(budget),
                Cell(found.name(best)),
                _accuracy(best),
                Cell(ratio(best, dearest, "flops")),
                Cell(best_path(share)),
            ]
            if best
            else [Cell(budget), Cell("no condition costs this little"), *[Cell(DASH)] * 3]
        )
    return Table(
        ["budget", "best condition", "accuracy", "its cost", "recipe"], rows, "rlrrl", look="budget"
    )


def best_path(share: float) -> str:
    """Where a sweep keeps the recipe of the best condition for a budget, from its folder."""
    return f"best/budget-{share:.2f}.toml"


def failures(found: Findings) -> Table:
    """The runs without a result and why."""
    rows = [
        [
            Cell(row.run, f"{row.label or in_words(row.settings) or row.role}, seed {row.seed}"),
            Cell(row.status),
        ]
        for row in found.failed
    ]
    return Table(["run", "why"], rows, "ll", look="failed")
