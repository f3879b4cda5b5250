"""The charts of a sweep's page: quality and cost over an axis of numbers, quality against cost, or
bars.

In: `Findings`. Out: `Curves`, a `Scatter`, `Bar`s. Decided here: what is drawn against what.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

from mlx_distill.reporting.charts import Curves, Level, Point, Scatter, Series, line_chart, scatter
from mlx_distill.reporting.condition_words import in_words
from mlx_distill.reporting.page import Bar
from mlx_distill.reporting.run_charts import RUN_ROLES, run_role
from mlx_distill.reporting.study import MATCHED, Condition, pareto_front
from mlx_distill.reporting.sweep_findings import FEW_SEEDS, Findings, Swept
from mlx_distill.words import amount, counted, is_number

COSTS = {"flops": "arithmetic", "train_seconds": "time", "peak_bytes": "peak memory"}


def x_axis(swept: Swept) -> str | None:
    """The first axis of at least two numbers."""
    for field, values in swept.axes.items():
        if len({*map(str, values)}) > 1 and all(map(is_number, values)):
            return field
    return None


def curves(found: Findings) -> list[tuple[str, list[Condition]]]:
    """(label, conditions by x) for each curve against the x axis.

    First the grid's by its other axes, then those of the arms that have points of x.
    """
    x = x_axis(found.swept)
    if x is None:
        return []
    others = {field: values for field, values in found.swept.axes.items() if field != x}
    combinations = [dict(zip(others, values, strict=True)) for values in product(*others.values())]
    places = {_key(settings.values()): i for i, settings in enumerate(combinations)}
    labels = {"": 0}
    lines: dict[tuple[int, int], list[Condition]] = {}  # by number of label and of combination
    for one in found.students:
        number = labels.setdefault(one.label, len(labels))
        place = places.get(_key(one.settings.get(field) for field in others))
        if x in one.settings and place is not None:
            lines.setdefault((number, place), []).append(one)
    drawn = []
    for number, place in sorted(lines):
        members = lines[number, place]
        label = members[0].label
        if len(members) > 1 or label in ("", MATCHED):
            words = ", ".join(filter(None, (label, in_words(combinations[place]))))
            drawn.append((words or "grid", sorted(members, key=lambda one: one.settings[x])))
    return [("accuracy", members) for _, members in drawn] if len(drawn) == 1 else drawn


def _key(values: Iterable[Any]) -> tuple:
    """Settings by which conditions are found: equal where they are the same (`same`)."""
    return tuple(
        _key(value)
        if isinstance(value, list | tuple)
        else _key(sorted(value.items()))
        if isinstance(value, dict)
        else value
        for value in values
    )


def quality_chart(found: Findings) -> Curves | None:
    """Accuracy against the x axis, with bands, and single runs as dots where there are several
    seeds.
    """
    x = x_axis(found.swept)
    if x is None:
        return None
    series = [_accuracies(label, i, x, members) for i, (label, members) in enumerate(curves(found))]
    if not series:
        return None
    bounds = {"95\u00a0% bars" if one.error_bars else "95\u00a0% band" for one in series}
    dots = ["one dot a run"] if any(one.dots for one in series) else []
    unit = ", ".join(["share of problems", *sorted(bounds), *dots])
    return _over(x, found, "Accuracy", unit, series, levels=levels(found), from_zero=False)


def levels(found: Findings) -> tuple[Level, ...]:
    """The models that every run shares: what training began with, and what it aims at."""
    models = ("student before", "base", found.base), ("teacher", "teacher", found.teacher)
    return tuple(Level(label, role, one.accuracy.mean) for label, role, one in models if one)


def _accuracies(label: str, i: int, x: str, members: list[Condition]) -> Series:
    known = [one.accuracy for one in members]
    several = [one for one in members if len(one.rows) > 1]
    return Series(
        label,
        run_role(i),
        _at(x, members),
        tuple(one.mean for one in known),
        low=tuple(one.low for one in known),
        high=tuple(one.high for one in known),
        dots=tuple((one.settings[x], row.accuracy) for one in several for row in one.rows),
        dashed=i >= len(RUN_ROLES),
        error_bars=any(len(one.rows) < FEW_SEEDS for one in members),
    )


def cost_chart(found: Findings) -> Curves | None:
    """Costs of the first curve against the x axis, as shares of those at its largest x."""
    x, drawn = x_axis(found.swept), curves(found)
    if x is None or not drawn or drawn[0][1][0].label or len(drawn[0][1]) < 2:
        return None
    members = drawn[0][1]
    last = members[-1]
    series = [
        Series(
            words,
            run_role(i),
            _at(x, members),
            tuple(one.cost(name) / last.cost(name) for one in members),
        )
        for i, (name, words) in enumerate(COSTS.items())
        if last.cost(name)
    ]
    return _over(x, found, "Cost", f"share of that at {in_words({x: last.settings[x]})}", series)


def _over(
    x: str, found: Findings, title: str, unit: str, series: list[Series], **more: Any
) -> Curves | None:
    """A large chart of shares over the x axis, its ticks at the values of the sweep."""
    values = tuple(found.swept.axes[x])
    return line_chart(
        title,
        unit,
        series,
        shares=True,
        x_name=x.rpartition(".")[2],
        x_values=values,
        large=True,
        **more,
    )


def _at(x: str, members: list[Condition]) -> tuple[float, ...]:
    return tuple(one.settings[x] for one in members)


def pareto_chart(found: Findings) -> Scatter | None:
    """Accuracy against FLOPs; the conditions that no cheaper one beats are joined."""
    front = {id(one) for one in pareto_front(found.students)}
    roles = {
        id(one): run_role(i) for i, (_, members) in enumerate(curves(found)) for one in members
    }
    other = "compared" if roles else "accent"
    points = [
        Point(
            found.name(one),
            roles.get(id(one), other),
            one.cost("flops"),
            known.mean,
            known.low,
            known.high,
            id(one) in front,
        )
        for one in found.students
        if one.cost("flops") > 0
        for known in [one.accuracy]
    ]
    return scatter(
        "Accuracy against cost",
        "share of problems, 95\u00a0% interval",
        points,
        "arithmetic of the training steps",
        _flops,
        levels(found),
    )


def _flops(value: float) -> str:
    return amount(value, "FLOP")


def bars(found: Findings) -> list[Bar]:
    """Accuracy by condition in the order given, for sweeps without an axis of numbers."""
    if x_axis(found.swept) or not found.students:
        return []
    models = [(found.base, "student before", "base")]
    models += [(one, found.name(one), "accent") for one in found.students]
    models += [(found.teacher, "teacher", "teacher")]
    return [_bar(one, label, role) for one, label, role in models if one]


def _bar(one: Condition, label: str, role: str) -> Bar:
    known, several = one.accuracy, len(one.rows) > 1
    remark = counted(len(one.rows), "seed") if several else ""
    dots = tuple(row.accuracy for row in one.rows) if several else ()
    return Bar(label, remark, role, known.mean, known.low, known.high, dots)
