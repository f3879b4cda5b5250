"""A sweep: many runs of one recipe, which share one teacher pass and end in one table and one page.

In: `Sweep`s with their points. Out: a folder for each, and the run folders. Decided here: what runs
when and what becomes of a failure. Runs are ordinary run folders made by `mlx-distill run`, each in
a process of its own; a sweep that is started again goes on where it stopped.

    FOLDER/     recipes/RUN.toml  logs/RUN.log  results.csv  report.md  report.html
    best/budget-0.50.toml RUNS/RUN/   a run folder
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from math import inf, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_distill.cost.plan import Plan
from mlx_distill.data.day import share_day
from mlx_distill.errors import CacheError, DistillError, RecipeError, RunError
from mlx_distill.machine import this_machine
from mlx_distill.readers import read_text
from mlx_distill.recipe import with_values
from mlx_distill.reporting.kept_run import Run, kl_before_after, read_run
from mlx_distill.reporting.study import BUDGETS, Condition, Row, best_within, conditions, rows_text
from mlx_distill.reporting.sweep_findings import Swept
from mlx_distill.reporting.sweep_page import write_report
from mlx_distill.reporting.sweep_tables import best_path
from mlx_distill.runs.own_files import LOCK
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.score import Score
from mlx_distill.signals import ended_by_signals
from mlx_distill.sweeps.file import Point, Sweep
from mlx_distill.sweeps.jobs import Ended, Job, side_by_side
from mlx_distill.teaching.cache import TeacherCache
from mlx_distill.terminal.plan import plan_of
from mlx_distill.view import View
from mlx_distill.words import DASH, amount, duration, percent

PARTS, RESULTS = ("recipes", "logs", "best"), ("results.csv", "report.md", "report.html")


def sweep(
    sweeps: Sequence[Sweep], view: View, backend: str = "auto", at_once: int = 1
) -> list[Path]:
    """Run what is missing of some sweeps, `at_once` runs side by side, each sweep to its report;
    returns the reports' paths.

    Raises `RecipeError` or `RunError` before anything runs if two sweeps get in each other's way or
    a folder holds another recipe's run, and `RunError` in the end if a run failed; then, and before
    the `KeyboardInterrupt` of a Ctrl-C, the reports of what there is have been written.
    """
    points = distinct(sweeps)
    with ExitStack() as stack:
        for one in sweeps:
            stack.enter_context(_held(one))
        _share_days(points)
        stack.enter_context(ended_by_signals())
        queue = Queue(sweeps, points, view, backend, at_once)
        try:
            queue.run()
        finally:
            reports = [write_results(one, queue.troubles) for one in sweeps]
            for path in reports:
                view.say(f"report: {path}")
    if queue.troubles:
        path, trouble = next(iter(queue.troubles.items()))
        raise RunError(
            f"{len(queue.troubles)} of {len(points)} runs failed, the others are kept; {path}: "
            f"{trouble}; the same command tries again"
        )
    return reports


def distinct(sweeps: Sequence[Sweep]) -> dict[Path, Point]:
    """Each run once, by its folder. Raises as `sweep` does before anything runs."""
    folders = [one.folder for one in sweeps]
    for one in sweeps:
        if folders.count(one.folder) > 1:
            raise RecipeError(
                f"{one.path}: another of these sweeps has the folder {one.folder} too: name one "
                "with `folder`"
            )
        if (one.folder / "recipe.toml").exists():
            raise RunError(
                f"{one.folder} holds a run, and {one.path} would put its results there: name "
                "another `folder`"
            )
    points: dict[Path, Point] = {}
    for point in (point for one in sweeps for point in one.points):
        other = points.setdefault(point.folder.path, point)
        if other.recipe.digest() != point.recipe.digest():
            changes = "; ".join(other.recipe.differences(point.recipe))
            raise RecipeError(
                f"{point.folder.path} would hold two different runs ({changes}): give these "
                "sweeps different `runs`"
            )
    for point in points.values():
        _refuse_changed(point)
    return points


def _refuse_changed(point: Point) -> None:
    folder = point.folder
    if not (folder.path / "recipe.toml").exists() or not folder.has_results():
        return
    try:
        changes = "; ".join(folder.recipe().differences(point.recipe))
    except RunError:  # the run itself will say, and is one that failed; the others go on
        return
    if changes:
        raise RunError(
            f"{folder.path} holds another run than this sweep's ({changes}): name another folder "
            "with `runs`, or delete it"
        )


@contextmanager
def _held(one: Sweep) -> Iterator[None]:
    """A sweep's own folder, made if need be and held for this process; its lock is the first thing
    in it.
    """
    _refuse_foreign(one)
    _make(one, one.folder)
    with RunFolder(one.folder).locked():
        for part in PARTS:
            _make(one, one.folder / part)
        yield


def _make(one: Sweep, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{one.path}: cannot write to {folder} ({error.strerror}): name another `folder`"
        ) from None


def _refuse_foreign(one: Sweep) -> None:
    """Raises `RunError` where files of others have the names of a sweep's: its folder has its lock,
    or its results.
    """
    there = [path for name in (*PARTS, *RESULTS) if (path := one.folder / name).exists()]
    foreign = [path for path in there if not path.is_dir() or any(path.iterdir())]
    if not foreign or (one.folder / LOCK).exists():
        return
    try:
        ours = read_text(one.folder / "results.csv").startswith(rows_text([]))
    except DistillError:
        ours = False
    if not ours:
        raise RunError(
            f"{one.path}: {foreign[0]} is there, and no sweep made it: move it away, or name "
            "another `folder`"
        )


def _share_days(points: dict[Path, Point]) -> None:
    """Where a chat template reads the clock, runs that are compared say one day: that of a run
    which has begun, if one has.
    """
    days: dict[Path, list[str]] = {}
    for path, point in points.items():
        days.setdefault(path.parent, []).append(point.folder.kept_day())
    for runs, kept in days.items():
        share_day(runs, next(filter(None, kept), ""))


class Queue:
    """The runs that are missing, in order, after one teacher pass for all of them; `troubles` says
    which failed, and why.
    """

    def __init__(
        self,
        sweeps: Sequence[Sweep],
        points: dict[Path, Point],
        view: View,
        backend: str,
        at_once: int,
    ):
        self.sweeps, self.points, self.view, self.backend, self.at_once = (
            sweeps,
            points,
            view,
            backend,
            at_once,
        )
        self.missing = [point for point in points.values() if not point.done]
        self.troubles: dict[Path, str] = {}

    def run(self) -> None:
        before = len(self.points) - len(self.missing)
        self.view.say(
            f"{len(self.points)} runs" + (f", {before} of them done before" if before else "")
        )
        if self.missing:
            self._teach()
            self._train()
        for one in self.sweeps:
            self._score_shared(one)

    def _train(self) -> None:
        by_job = {self._job(point): point for point in self.missing}
        memory = this_machine(self.backend).memory_bytes if self.at_once > 1 else 0
        progress = self.view.count("runs", len(by_job))
        for ended in side_by_side(list(by_job), self.at_once, memory, self.view.say):
            if not ended.stopped:
                self._account(by_job[ended.job], ended)
                progress(1)

    def _account(self, point: Point, ended: Ended) -> None:
        if ended.trouble:
            self.troubles[point.folder.path] = ended.trouble
            self.view.say(f"{point.name}: failed: {ended.trouble}")
        else:
            self.view.say(
                f"{point.name}: {percent(student_row(point).accuracy)} after "
                f"{duration(ended.seconds)}"
            )
        for one in self._sweeps_of(point):
            write_results(one, self.troubles)

    def _score_shared(self, one: Sweep) -> None:
        """The student before training and the teacher, scored once in one of the runs; a finished
        run only adds what it lacks.
        """
        done = [point for point in one.points if point.done]
        if not done or not one.shared - shared_scores(one).keys():
            return
        flags = {"score_base": "base" in one.shared, "score_teacher": "teacher" in one.shared}
        scoring = dataclasses.replace(done[0], recipe=with_values(done[0].recipe, eval=flags))
        self.view.say(f"scoring {' and '.join(sorted(one.shared))}")
        for ended in side_by_side([self._job(scoring)]):
            if ended.trouble:
                self.troubles[done[0].folder.path] = f"scoring what all runs share: {ended.trouble}"

    # the teacher

    def _teach(self) -> None:
        """One pass over all sequences that any of the missing runs needs. Where it fails, each run
        asks for what it lacks itself.
        """
        recipes = {}
        for point in self.missing:
            recipe = point.recipe
            if recipe.teacher.cache != "off":
                what = [
                    table.model_dump(mode="json")
                    for table in (recipe.teacher, recipe.data, recipe.student)
                ]
                recipes.setdefault(json.dumps([*what, recipe.run.seed]), self._recipe_file(point))
        if not recipes:
            if any(point.recipe.objective.kd_weight > 0 for point in self.missing):
                self.view.say(
                    'note: each run asks the teacher by itself; teacher.cache = "hidden" or '
                    '"top_k" in [set] keeps its answers'
                )
            return
        log = self.sweeps[0].folder / "logs" / "teacher.log"
        self.view.say("asking the teacher once for all runs that read its answers")
        for ended in side_by_side(
            [Job("teacher", ("teach", *map(str, recipes.values()), "--backend", self.backend), log)]
        ):
            if ended.trouble:
                self.view.say(
                    "note: the teacher pass failed, so each run makes what it lacks: "
                    f"{ended.trouble}"
                )

    # the jobs

    def _job(self, point: Point) -> Job:
        log = self._home(point) / "logs" / f"{point.name}.log"
        arguments = ("run", str(self._recipe_file(point)), "--backend", self.backend)
        plan = planned(point, self.backend) if self.at_once > 1 else None
        return Job(
            point.name, arguments, log, plan.peak.total if plan else inf, point.folder.in_use
        )  # what cannot be planned runs alone

    def _recipe_file(self, point: Point) -> Path:
        recipes = RunFolder(self._home(point) / "recipes")
        recipes.write_text(f"{point.name}.toml", point.recipe.toml())
        return recipes.path / f"{point.name}.toml"

    def _home(self, point: Point) -> Path:
        """The folder of the first sweep that the run belongs to."""
        return self._sweeps_of(point)[0].folder

    def _sweeps_of(self, point: Point) -> list[Sweep]:
        return [
            one
            for one in self.sweeps
            if any(other.folder.path == point.folder.path for other in one.points)
        ]


def planned(point: Point, backend: str) -> Plan | None:
    """A run's plan; None for a model whose cost cannot be planned, or for data that the run itself
    will refuse.
    """
    try:
        return plan_of(point.recipe, this_machine(backend), advise=False)[1]
    except DistillError:
        return None


def outline(sweeps: Sequence[Sweep], console: Console, backend: str = "auto") -> None:
    """Print which runs there are, what each is planned to cost, and which are done. Runs nothing."""
    table = Table()
    for column in ("run", "teacher's answers", "FLOPs", "peak memory", ""):
        table.add_column(
            column,
            justify="right" if column in ("FLOPs", "peak memory") else "left",
            overflow="fold",
        )
    total = 0.0
    for point in distinct(sweeps).values():
        plan, teacher = planned(point, backend), point.recipe.teacher
        asked = (
            "none"
            if point.recipe.objective.kd_weight == 0
            else "live"
            if teacher.cache == "off"
            else "kept"
        )
        cost = (amount(plan.total_flops), amount(plan.peak.total, "B")) if plan else (DASH, DASH)
        total += plan.total_flops if plan and not point.done else 0.0
        table.add_row(point.name, asked, *cost, "done" if point.done else "")
    console.print(table)
    console.print(
        f"{amount(total, 'FLOP')} of training are left to do", markup=False, highlight=False
    )


# the results


def write_results(one: Sweep, troubles: dict[Path, str]) -> Path:
    """results.csv, report and best recipes of a sweep, from the runs that are there; returns the
    page's path.
    """
    rows = collect(one, troubles)
    RunFolder(one.folder).write_text("results.csv", rows_text(rows))
    full = (one.full.label, one.full.settings) if one.full else None
    page = write_report(
        Swept(
            one.name, one.file.question, one.axes, full, rows, len(one.points), teacher_pass(one)
        ),
        one.folder,
    )
    _write_best(one, rows)
    return page


def collect(one: Sweep, troubles: dict[Path, str]) -> list[Row]:
    """A row for teacher and base, if they were scored, and one for each run that is done or failed."""
    rows = []
    for point in one.points:
        if point.done:
            rows.append(student_row(point))
        elif point.folder.path in troubles:
            rows.append(
                Row(
                    point.name,
                    "student",
                    point.label,
                    point.settings,
                    point.recipe.run.seed,
                    troubles[point.folder.path],
                )
            )
    return [
        *(_row(run, role, "", {}, point) for role, (run, point) in shared_scores(one).items()),
        *rows,
    ]


def shared_scores(one: Sweep) -> dict[str, tuple[Run, Point]]:
    """The first finished run that scored the base, and the teacher, as far as all runs share them."""
    found: dict[str, tuple[Run, Point]] = {}
    for point in one.points:
        run = read_run(point.folder.path) if point.done else None
        for role in sorted(one.shared & run.scores.keys() - found.keys()) if run else ():
            found[role] = run, point
    return found


def student_row(point: Point) -> Row:
    """What a finished run says."""
    run = read_run(point.folder.path)
    row = _row(run, "student", point.label, point.settings, point)
    manifest, logged = (
        run.manifest,
        {name: _column(run, name) for name in ("tokens", "loss_tokens", "seconds", "peak_bytes")},
    )
    kl = kl_before_after(run)[1]
    return dataclasses.replace(
        row,
        steps=manifest.get("steps", len(run.metrics)),
        exported_step=manifest.get("exported_step", 0),
        tokens_read=manifest.get("tokens_read", sum(logged["tokens"])),
        loss_tokens=manifest.get("loss_tokens", sum(logged["loss_tokens"])),
        flops=manifest.get("flops", {}).get("total", 0.0),
        train_seconds=sum(logged["seconds"]),
        peak_bytes=max(logged["peak_bytes"], default=0),
        kl=nan if kl is None else kl,
    )


def _column(run: Run, name: str) -> list[float]:
    """A number of each step's row, as far as the log can be read."""
    return [row[name] for row in run.metrics if isinstance(row.get(name), int | float)]


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
        backend=made.get("backend", ""),
        device=made.get("device", ""),
        commit=made.get("git_commit", ""),
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
        (point, point.folder.readable("manifest.json").get("teacher_cache"))
        for point in one.points
        if point.done
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


def _write_best(one: Sweep, rows: list[Row]) -> None:
    """The recipe of the most accurate condition within each budget, ready to run; those of an
    earlier state go.
    """
    found = conditions(rows)
    for share in BUDGETS:
        path = one.folder / best_path(share)
        if best := best_within(found, share):
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
