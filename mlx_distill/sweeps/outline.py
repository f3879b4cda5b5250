"""A sweep before it runs: which runs there are, and what each is planned to cost."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mlx_distill.cost.plan import Plan
from mlx_distill.errors import DistillError
from mlx_distill.machine import this_machine
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.sweeps.points import Point
from mlx_distill.sweeps.sweep import Sweep, distinct
from mlx_distill.terminal.plan import plan_of
from mlx_distill.words import DASH, amount


def planned(point: Point, backend: str) -> Plan | None:
    """A run's plan; None for a model whose cost cannot be planned, or for data that the run itself
    will refuse.
    """
    try:
        return _plan(point, backend)
    except DistillError:
        return None


def _plan(point: Point, backend: str) -> Plan:
    return plan_of(point.recipe, this_machine(backend), advised=False)[1]


def outline(sweeps: Sequence[Sweep], console: Console, backend: str = "auto") -> None:
    """Print which runs there are, what each is planned to cost, and which are done."""
    table = Table()
    for column in ("run", "teacher's answers", "FLOPs", "peak memory", ""):
        number = column in ("FLOPs", "peak memory")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    left_flops, reasons = 0.0, []
    for point in distinct(sweeps).values():
        cost = DASH, DASH
        try:
            plan = _plan(point, backend)
            cost = amount(plan.total_flops), amount(plan.peak_bytes, "B")
            left_flops += 0.0 if point.done else plan.total_flops
        except DistillError as error:
            reasons.append(f"{point.name}: {error}")
        done = "done" if point.done else ""
        table.add_row(point.name, _teacher_answers(point.recipe), *cost, done)
    console.print(table)
    for line in _said(left_flops, reasons, table.row_count):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _said(left_flops: float, reasons: list[str], runs: int) -> list[str]:
    """What is left to do, and what is not in that sum."""
    left = f"{amount(left_flops, 'FLOP')} of training are left to do"
    if not reasons:
        return [left]
    without = f"{len(reasons)} of {runs} runs cannot be planned; the first: {reasons[0]}"
    return [without] if len(reasons) == runs else [f"{left} in the others", without]


def _teacher_answers(recipe: Recipe) -> str:
    if recipe.objective.kd_weight == 0:
        return "none"
    return "live" if recipe.teacher.cache == "off" else "kept"
