"""What the runs of a sweep say: a row for each, the page, and the best recipe for each budget.

In: the run folders that are there, and the troubles of those that failed. Out: results.csv,
report.md and report.html, best/*.toml. Decided here: which run speaks for the models that all runs
share (the student before training, the teacher).
"""

import dataclasses
import os
from hashlib import sha256
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from mlx_distill.errors import CacheError
from mlx_distill.recipe.recipe import with_values
from mlx_distill.reporting.kept_run import Run, kl_before_after, read_run
from mlx_distill.reporting.study import BUDGETS, Condition, Row, best_within, conditions, rows_text
from mlx_distill.reporting.sweep_findings import Places, Swept, shared_model
from mlx_distill.reporting.sweep_page import write_report
from mlx_distill.reporting.sweep_tables import best_path
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.score import Score
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.sweeps.points import Point
from mlx_distill.sweeps.sweep import Sweep
from mlx_distill.teaching.folder import TeacherCache
from mlx_distill.words import percent

ROWS = "results.csv"


def write_results(one: Sweep, troubles: dict[Path, str]) -> Path:
    """results.csv, report and best recipes of a sweep, from the runs that are there; returns the
    page's path.
    """
    rows = collect(one, troubles)
    RunFolder(one.folder).write_text(ROWS, rows_text(rows))
    full = (one.full.label, one.full.settings) if one.full else None
    count, teacher = len(one.points), teacher_pass(one)
    swept = Swept(
        one.name, one.file.question, one.axes, full, rows, count, teacher, places(one), ROWS
    )
    write_best(one, rows)
    return write_report(swept, one.folder)


def places(one: Sweep) -> dict[str, Places]:
    """Where the page, recipe and log of each run lie, as far as they are there: recipe and log lie
    with the first of the sweeps that were started together.
    """

    def address(path: Path) -> str:
        return quote(os.path.relpath(path, one.folder)) if path.is_file() else ""

    found = {}
    for point in one.points:
        run = point.folder.path
        kept = one.folder / "recipes" / f"{point.name}.toml"
        recipe = kept if kept.is_file() else run / "recipe.toml"
        log = one.folder / "logs" / f"{point.name}.log"
        found[point.name] = Places(address(run / "report.html"), address(recipe), address(log))
    return found


def collect(one: Sweep, troubles: dict[Path, str]) -> list[Row]:
    """A row for teacher and base, if they were scored, and for each run that is done or failed."""
    shared = [_row(run, role, "", {}, point) for role, (run, point) in shared_scores(one).items()]
    students = []
    for point in one.points:
        if point.done:
            students.append(student_row(point))
        elif trouble := troubles.get(point.folder.path):
            seed = point.recipe.run.seed
            students.append(Row(point.name, "student", point.label, point.settings, seed, trouble))
    return shared + students


def shared_scores(one: Sweep) -> dict[str, tuple[Run, Point]]:
    """The first finished run that scored the base, and the teacher, where all runs share them."""
    found: dict[str, tuple[Run, Point]] = {}
    for point in one.points:
        if found.keys() == one.shared:
            break
        scored = point.folder.readable(TaskScores).whole.keys()
        roles = sorted(one.shared & scored - found.keys())
        if roles and point.done:
            run = read_run(point.folder.path)
            found |= {role: (run, point) for role in roles}
    return found


def student_row(point: Point) -> Row:
    """What a finished run says."""
    run = read_run(point.folder.path)
    row = _row(run, "student", point.label, point.settings, point)
    made, logged = run.manifest, run.metrics
    kl = kl_before_after(run)[1]
    return dataclasses.replace(
        row,
        steps=made.steps or 0 if made.trained_steps is None else made.trained_steps,
        exported_step=made.exported_step or 0,
        tokens_read=made.tokens_read or sum(row.tokens for row in logged),
        loss_tokens=made.loss_tokens or sum(row.loss_tokens for row in logged),
        flops=made.total_flops,
        train_seconds=sum(row.seconds for row in logged),
        peak_bytes=max((row.peak_bytes for row in logged), default=0),
        kl=nan if kl is None else kl,
    )


def _row(run: Run, role: str, label: str, settings: dict[str, Any], point: Point) -> Row:
    """The score of one model of a run."""
    score, made = run.scores[role], run.manifest
    return Row(
        point.name,
        role,
        label,
        settings,
        point.recipe.run.seed,
        accuracy=score.accuracy,
        unfinished=score.unfinished,
        well_formed=score.well_formed,
        mean_tokens=score.mean_tokens,
        backend=made.backend,
        device=made.device,
        commit=made.git_commit,
        problems=_which(score),
        right=tuple(map(fmean, score.correct.values())),
    )


def _which(score: Score) -> str:
    return sha256("\n".join(score.correct).encode()).hexdigest()[:12]


def teacher_pass(one: Sweep) -> dict[str, Any]:
    """The teacher's kept answers: sequences, tokens and bytes, and how many runs read them; {} if
    none did.
    """
    named = [
        (point, point.folder.readable(Manifest).teacher_cache) for point in one.points if point.done
    ]
    reads = [
        Path(point.recipe.teacher.cache_folder).expanduser() / name for point, name in named if name
    ]
    caches = [cache for folder in sorted(set(reads)) if (cache := _cache(folder))]
    if not caches:
        return {}
    sequences, tokens, size = (
        sum(column) for column in zip(*(cache.size() for cache in caches), strict=True)
    )
    return {"sequences": sequences, "tokens": tokens, "bytes": size, "runs": len(reads)}


def _cache(folder: Path) -> TeacherCache | None:
    """The cache in a folder; None where it is gone or cannot be read, which runs that need it say
    themselves.
    """
    try:
        return TeacherCache.at(folder) if (folder / "manifest.json").exists() else None
    except CacheError:
        return None


def write_best(one: Sweep, rows: list[Row]) -> None:
    """The recipe of the most accurate condition within each budget that beats the undistilled
    student, ready to run; those of an earlier state go.
    """
    found, base = conditions(rows), shared_model(rows, "base")
    for share in BUDGETS:
        path = one.folder / best_path(share)
        if best := best_within(found, share, base):
            RunFolder(path.parent).write_text(path.name, _best_recipe(one, best, share, len(found)))
        else:
            path.unlink(missing_ok=True)


def _best_recipe(one: Sweep, best: Condition, share: float, of: int) -> str:
    point = next(
        point
        for point in one.points
        if (point.label, point.settings) == (best.label, best.settings)
    )
    table = one.base.eval
    recipe = with_values(
        point.recipe,
        run={"name": f"{one.name}-budget-{share:.2f}", "folder": one.base.run.folder},
        eval={"score_base": table.score_base, "score_teacher": table.score_teacher},
    )
    sure = best.accuracy
    return (
        f"# The most accurate of {of} conditions that cost at most {100 * share:.0f} % of the "
        f"dearest one's arithmetic: {best.name},\n"
        f"# {percent(sure.mean)} ({percent(sure.low)} to {percent(sure.high)}, {len(best.rows)} "
        f"seeds) in the sweep {one.name}.\n\n"
    ).replace("\u00a0", " ") + recipe.toml()
