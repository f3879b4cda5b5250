"""The report: run folders → a Markdown file and one self-contained HTML page.

In: run folders, which `kept_run.py` reads. Out: `report.md` and `report.html`, of one run or of
several side by side.
"""

from collections.abc import Sequence
from pathlib import Path

from mlx_distill.errors import NotFound
from mlx_distill.reporting.commands import score_command
from mlx_distill.reporting.kept_run import Run, kl_before_after, method_of, read_run
from mlx_distill.reporting.page import (
    Bar,
    Bars,
    Block,
    Charts,
    Command,
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
from mlx_distill.reporting.run_words import by_task, headline, headline_of_one, leads, subline
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
    """Several runs side by side, by task; each run's own sections folded below."""
    groups = by_task(runs)
    unscored = [run for run in runs if "student" not in run.scores]
    folds: list[Block] = [
        Fold(run.name, headline_of_one(run), subline(run), run_sections(run), look=_look(run))
        for run in runs
    ]
    sections = [
        *(_scores(runs, task, members, len(groups)) for task, members in groups.items()),
        *([Section("Not scored", _not_scored(unscored))] if unscored else []),
        Section("Cost", [_costs(runs)]),
        Section("Training", [Charts(overlays(runs))]),
        Section("Each run", folds),
    ]
    return Page([f"{len(runs)} runs"], headline(runs), "", leads(runs), sections, NOTES)


def _look(run: Run) -> str:
    return "" if "student" in run.scores else "faded"


def _scores(runs: Sequence[Run], task: str, members: Sequence[Run], tasks: int) -> Section:
    """The runs of one task, in the order in which they were named."""
    ordered = [run for run in runs if run in members]
    title, remark = ("Scores", task) if tasks == 1 else (f"Scores on {task}", "")
    return Section(title, [Bars(_bars(runs, ordered)), _summary(ordered)], remark)


def _not_scored(runs: Sequence[Run]) -> list[Block]:
    """What is known of them, and how each comes to a score."""
    commands = [score_command(run.folder, run.recipe) for run in runs]
    known = "\n".join(filter(None, commands))
    how: list[Block] = [Note("This scores them:"), Command(known)] if known else []
    return [_summary(runs), *how]


def _bars(runs: Sequence[Run], members: Sequence[Run]) -> list[Bar]:
    """The students, between the base and the teacher where all of them share these."""
    first = members[0]

    def remark(run: Run) -> str:
        return "" if run is first else method_of(run.recipe, first.recipe)

    def shared_model(model: str, label: str) -> list[Bar]:
        scores = [run.scores[model] for run in members if model in run.scores]
        same = len({(score.accuracy, score.problems) for score in scores}) == 1
        return [score_bar(label, "", model, scores[0])] if same else []

    students = [
        score_bar(run.name, remark(run), run_role(i), run.scores["student"])
        for i, run in enumerate(runs)
        if run in members
    ]
    before = shared_model("base", "student before")
    return [*before, *students, *shared_model("teacher", "teacher")]


def _summary(runs: Sequence[Run]) -> Table:
    head = [
        "run",
        "before",
        "after",
        "95\u00a0% interval",
        "teacher",
        "% of the teacher's accuracy",
        "% of the teacher's lead",
        "KL before",
        "KL after",
    ]
    return Table(head, [_summary_row(run) for run in runs], "lrrrrrrrr")


def _summary_row(run: Run) -> list[Cell]:
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    kept = retention(student, base, teacher) if student and base and teacher else None
    look = _look(run)
    first, last = (DASH if kl is None else number(kl) for kl in kl_before_after(run))
    texts = [
        _percent(teacher.accuracy if teacher else None),
        _percent(kept.accuracy if kept else None),
        _percent(kept.gain if kept else None),
        first,
        "unchanged" if first == last != DASH else last,
    ]
    return [
        Cell(run.name, look=look),
        Cell(_percent(base.accuracy if base else None), look=look),
        Cell(_percent(student.accuracy if student else None), look=look or "strong"),
        Cell(f"{percent(student.low)} to {percent(student.high)}" if student else DASH, look=look),
        *(Cell(text, look=look) for text in texts),
    ]


def _percent(share: float | None) -> str:
    return DASH if share is None else percent(share)


def _costs(runs: Sequence[Run]) -> Table:
    costs = [cost_of(run) for run in runs]
    rows = [
        [Cell(text, look=_look(run)) for text in (run.name, *cost.values())]
        for run, cost in zip(runs, costs, strict=True)
    ]
    return Table(["run", *costs[0]], rows, "lrrrrrrr")
