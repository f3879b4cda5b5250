"""Running sweeps: what runs when, and what becomes of a failure.

In: `Sweep`s with their points. Out: a folder for each, and the run folders. Runs are ordinary run
folders made by `mlx-distill run`, each in a process of its own; a sweep that is started again goes
on where it stopped.

    FOLDER/     recipes/RUN.toml  logs/RUN.log  results.csv  report.md  report.html
    best/budget-0.50.toml RUNS/RUN/   a run folder
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path

from mlx_distill.data.day import share_day
from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import of_people
from mlx_distill.machine import this_machine
from mlx_distill.readers import read_text
from mlx_distill.recipe.recipe import with_values
from mlx_distill.reporting.study import rows_text
from mlx_distill.runs.own_files import LOCK
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.signals import ended_by_signals
from mlx_distill.sweeps.jobs import Ended, Job, side_by_side
from mlx_distill.sweeps.outline import planned
from mlx_distill.sweeps.points import Point
from mlx_distill.sweeps.progress import Mirror, Runs
from mlx_distill.sweeps.results import shared_scores, student_row, write_results
from mlx_distill.sweeps.sweep import Sweep, distinct
from mlx_distill.view import View
from mlx_distill.words import duration, percent

# while runs end, a page is written again where this share of its runs is new: each one reads all
# runs that there are, and so the pages of a sweep take work in the number of its runs, not its square
NEWS = 1 / 20
PARTS, RESULTS = ("recipes", "logs", "best"), ("results.csv", "report.md", "report.html")


def run_sweeps(
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
    foreign = [path for path in there if not path.is_dir() or of_people(path)]
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
        self.sweeps, self.points = sweeps, points
        self.view, self.backend, self.at_once = view, backend, at_once
        self.missing = [point for point in points.values() if not point.done]
        self.troubles: dict[Path, str] = {}
        self._sweeps_of: dict[Path, list[Sweep]] = {path: [] for path in points}
        for one in sweeps:
            for path in dict.fromkeys(point.folder.path for point in one.points):
                self._sweeps_of[path].append(one)
        lacking = {point.folder.path for point in self.missing}
        self._ended = {one.folder: 0 for one in sweeps}  # runs that are done or failed
        for path, those in self._sweeps_of.items():
            for one in those:
                self._ended[one.folder] += path not in lacking
        self._told = self._ended.copy()  # those on the page

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
        watch = Runs(self.view, {job: point.words for job, point in by_job.items()})
        for ended in side_by_side(list(by_job), self.at_once, memory, self.view.say, watch):
            if not ended.stopped:
                self._account(by_job[ended.job], ended)
                progress(1)

    def _account(self, point: Point, ended: Ended) -> None:
        if ended.trouble:
            self.troubles[point.folder.path] = ended.trouble
            self.view.say(f"{point.words}: failed: {ended.trouble} ({point.name})")
        else:
            solved = percent(student_row(point).accuracy)
            took = f"{solved} after {duration(ended.seconds)}"
            self.view.say_fields([f"{point.words}: {took}", f"({point.name})"])
        for one in self._sweeps_of[point.folder.path]:
            self._ended[one.folder] += 1
            if self._ended[one.folder] - self._told[one.folder] >= NEWS * self._told[one.folder]:
                write_results(one, self.troubles)
                self._told[one.folder] = self._ended[one.folder]

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
        for ended in side_by_side([self._job(scoring)], watch=Mirror(self.view)):
            if ended.trouble:
                self.troubles[done[0].folder.path] = f"scoring what all runs share: {ended.trouble}"

    # the teacher

    def _teach(self) -> None:
        """One pass over all sequences that any of the missing runs needs. Where it fails, each run
        asks for what it lacks itself.
        """
        recipes = self._recipes_to_teach()
        if not recipes:
            if any(point.recipe.objective.kd_weight > 0 for point in self.missing):
                self.view.say(
                    'note: each run asks the teacher by itself; teacher.cache = "hidden" or '
                    '"top_k" in [set] keeps its answers'
                )
            return
        log = self.sweeps[0].folder / "logs" / "teacher.log"
        arguments = ("teach", *map(str, recipes), "--backend", self.backend)
        self.view.say("asking the teacher once for all runs that read its answers")
        for ended in side_by_side([Job("teacher", arguments, log)], watch=Mirror(self.view)):
            if ended.trouble:
                self.view.say(
                    "note: the teacher pass failed, so each run makes what it lacks: "
                    f"{ended.trouble}"
                )

    def _recipes_to_teach(self) -> list[Path]:
        """A recipe for each set of sequences that the teacher's kept answers are missing for."""
        recipes: dict[str, Path] = {}
        for point in self.missing:
            recipe = point.recipe
            if recipe.teacher.cache != "off":
                tables = recipe.teacher, recipe.data, recipe.student
                asked = [table.model_dump(mode="json") for table in tables]
                key = json.dumps([*asked, recipe.run.seed])
                recipes.setdefault(key, self._recipe_file(point))
        return list(recipes.values())

    # the jobs

    def _job(self, point: Point) -> Job:
        log = self._home(point) / "logs" / f"{point.name}.log"
        arguments = ("run", str(self._recipe_file(point)), "--backend", self.backend)
        plan = planned(point, self.backend) if self.at_once > 1 else None
        peak_bytes = plan.peak_bytes if plan else inf  # what cannot be planned runs alone
        return Job(point.name, arguments, log, peak_bytes, point.folder.in_use)

    def _recipe_file(self, point: Point) -> Path:
        recipes = RunFolder(self._home(point) / "recipes")
        recipes.write_text(f"{point.name}.toml", point.recipe.toml())
        return recipes.path / f"{point.name}.toml"

    def _home(self, point: Point) -> Path:
        """The folder of the first sweep that the run belongs to."""
        return self._sweeps_of[point.folder.path][0].folder
