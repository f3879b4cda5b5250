"""The report: run folders → a Markdown file and one self-contained HTML page.

In: run folders, which `kept_run.py` reads. Out: `report.md` and `report.html`, of one run or of
several side by side.
"""

from collections.abc import Sequence
from pathlib import Path

from mlx_distill.errors import NotFound
from mlx_distill.reporting.kept_run import Run, kl_before_after, method_of, read_run
from mlx_distill.reporting.page import (
    Bar,
    Bars,
    Block,
    Charts,
    Fold,
    Note,
    Page,
    Report,
    Section,
    write,
)
from mlx_distill.reporting.run_charts import overlays, run_role
from mlx_distill.reporting.run_cost import cost_of
from mlx_distill.reporting.run_page import NOTES, run_page, run_sections, score_bar
from mlx_distill.reporting.run_words import headline, headline_of_one, leads, subline
from mlx_distill.reporting.table import Cell, Table
from mlx_distill.scoring.score import retention
from mlx_distill.words import DASH, number, percent


def report(runs: list[Path], out: Path) -> Report:
    """Write `report.md` and `report.html` about `runs` into the folder `out`, which is made if need
    be.

    Each run's `eval.compare` names more run folders to set beside it. Raises `NotFound` where a
    path is not a run folder and `RunError` where nothing can be written at `out`.
    """
    if not runs:
        raise NotFound("no run to report on: name at least one run folder")
    read = [read_run(Path(folder)) for folder in runs]
    return write(run_page(read[0]) if len(read) == 1 else runs_page(read), out)


def runs_page(runs: Sequence[Run]) -> Page:
    """Several runs side by side, each run's own sections folded below."""
    bars = _bars(runs)
    scores: list[Block] = [Bars(bars)] if bars else [Note("None of these runs was scored.")]
    folds = [Fold(run.name, headline_of_one(run), subline(run), run_sections(run)) for run in runs]
    sections = [
        Section("Scores", [*scores, _summary(runs)]),
        Section("Cost", [_costs(runs)]),
        Section("Training", [Charts(overlays(runs))]),
        Section("Each run", folds),
    ]
    return Page([f"{len(runs)} runs"], headline(runs), "", leads(runs), sections, NOTES)


def _bars(runs: Sequence[Run]) -> list[Bar]:
    several_tasks = len({run.task for run in runs if "student" in run.scores}) > 1

    def remark(run: Run) -> str:
        if several_tasks:
            return run.task
        return "" if run is runs[0] else method_of(run.recipe, runs[0].recipe)

    return [
        score_bar(run.name, remark(run), run_role(i), run.scores["student"])
        for i, run in enumerate(runs)
        if "student" in run.scores
    ]


def _summary(runs: Sequence[Run]) -> Table:
    head = [
        "run",
        "before",
        "after",
        "95\u00a0% interval",
        "teacher",
        "of its accuracy",
        "of its lead",
        "KL before",
        "KL after",
    ]
    return Table(head, [_summary_row(run) for run in runs], "lrrrrrrrr")


def _summary_row(run: Run) -> list[Cell]:
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    kept = retention(student, base, teacher) if student and base and teacher else None
    return [
        Cell(run.name),
        Cell(_percent(base.accuracy if base else None)),
        Cell(_percent(student.accuracy if student else None), look="strong"),
        Cell(f"{percent(student.low)} to {percent(student.high)}" if student else DASH),
        Cell(_percent(teacher.accuracy if teacher else None)),
        Cell(_percent(kept.accuracy if kept else None)),
        Cell(_percent(kept.gain if kept else None)),
        *(Cell(DASH if kl is None else number(kl)) for kl in kl_before_after(run)),
    ]


def _percent(share: float | None) -> str:
    return DASH if share is None else percent(share)


def _costs(runs: Sequence[Run]) -> Table:
    costs = [cost_of(run) for run in runs]
    rows = [[run.name, *cost.values()] for run, cost in zip(runs, costs, strict=True)]
    return Table(["run", *costs[0]], [list(map(Cell, row)) for row in rows], "lrrrrrrr")
