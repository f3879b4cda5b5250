"""A kept run: what a run folder holds, read for the report.

In: a run folder as `runs/run_folder.py` lays it out, finished or not. Out: a `Run` whose absent or
unreadable parts are empty, each with a line in `notes` that says so. Decided here: where a run to
compare with is looked for, and what of two recipes is not the method.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_distill.errors import DataError, DistillError, NotFound, RunError
from mlx_distill.readers import path_of
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.read_when import is_read
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs import logs
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.rows import MetricsRow, ValidationRow
from mlx_distill.runs.sample import Sample, SampleToken
from mlx_distill.runs.small_files import AnyRow, R, SmallFiles
from mlx_distill.scoring.also import Further, further_scores
from mlx_distill.scoring.generations import FILE, Generation, first_texts
from mlx_distill.scoring.score import Difference, Score, compare
from mlx_distill.scoring.task_scores import TaskScores, changed_generations
from mlx_distill.words import counted

NOT_KNOWN = "versions, machine, data and cost are not known"
SEGMENTS = ("prompt", "cot", "answer")
NOT_THE_METHOD = {
    ("run", "name"),
    ("run", "folder"),
    ("run", "checkpoint_every"),
    ("run", "keep_checkpoints"),
    ("objective", "chunk_tokens"),
    ("eval", "compare"),
    ("eval", "batch_size"),
    ("eval", "score_teacher"),
    ("eval", "score_base"),
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; an absent part is empty and has a line in `notes`, by its file.

    ways: how many problems were compared as mathematics and how many as text. texts: by model
    that has a score, what it wrote first for each problem. also: what they scored on further tasks.
    """

    folder: Path
    recipe: Recipe | None
    manifest: Manifest
    metrics: list[MetricsRow]
    validation: list[ValidationRow]
    task: str
    ways: dict[str, int]
    scores: dict[str, Score]
    sample: list[SampleToken]
    notes: dict[str, str]
    texts: dict[str, dict[str, Generation]] = field(default_factory=dict)
    compared: list["Compared"] = field(default_factory=list)
    also: list[Further] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.recipe.run.name if self.recipe else self.manifest.name or self.folder.name


@dataclass(frozen=True)
class Compared:
    """Another run set beside this one.

    method: how its recipe differs; score: its student's; difference: this run's student minus that
    one; obstacle: a sentence that says why there is no difference, empty where there is one.
    """

    name: str
    method: str = ""
    score: Score | None = None
    difference: Difference | None = None
    obstacle: str = ""


def read_run(folder: Path) -> Run:
    """A run folder and the runs its recipe compares it with; raises `NotFound` where `folder` holds
    no run.
    """
    run = _read_parts(folder)
    named = run.recipe.eval.compare if run.recipe else ()
    texts = first_texts(folder / FILE) if run.scores else {}
    return replace(
        run,
        compared=[_compared(run, other) for other in named],
        texts={model: texts[model] for model in run.scores if model in texts},
        also=further_scores(folder, run.recipe.eval) if run.recipe else [],
    )


def _read_parts(folder: Path) -> Run:
    path_of(str(folder), "run folder", NotFound)
    if not any((folder / name).is_file() for name in ("recipe.toml", "manifest.json")):
        what = (
            "holds neither recipe.toml nor manifest.json" if folder.is_dir() else "does not exist"
        )
        raise NotFound(f"no run in {folder}: it {what}; name a folder that `mlx-distill run` wrote")
    notes: dict[str, str] = {}
    scored = _record(folder, TaskScores, notes, "this run was not scored")
    for model in scored.broken:
        notes[f"eval.json {model}"] = (
            f"eval.json: the score of the {model} is incomplete and is left out."
        )
    if "student" not in scored.whole:
        notes.setdefault("eval.json", "eval.json holds no score of the student.")
    manifest = _record(folder, Manifest, notes, NOT_KNOWN)
    for name, wrong in logs.changes(folder, manifest.logs).items():
        notes.setdefault(name, f"{wrong}.")
    if manifest.finished and (wrong := changed_generations(folder, scored)):
        notes["generations.jsonl"] = f"{wrong}."
    return Run(
        folder=folder,
        recipe=_recipe(folder, notes),
        manifest=manifest,
        metrics=_rows(folder, MetricsRow, notes, "there are no training curves"),
        validation=_rows(folder, ValidationRow, notes, "there are no validation curves"),
        task=scored.task,
        ways=scored.compared,
        scores=scored.whole,
        sample=_record(folder, Sample, notes, "no example is shown").tokens,
        notes=notes,
    )


def _recipe(folder: Path, notes: dict[str, str]) -> Recipe | None:
    try:
        return load_recipe(folder / "recipe.toml")
    except NotFound:
        notes["recipe.toml"] = "No recipe.toml: the recipe is not known."
    except DistillError as error:
        notes["recipe.toml"] = f"{error}: the recipe is not known."
    return None


def _record(folder: Path, kind: type[R], notes: dict[str, str], otherwise: str) -> R:
    try:
        if (folder / kind.FILE).exists():
            return SmallFiles(folder).read(kind)
        notes[kind.FILE] = f"No {kind.FILE}: {otherwise}."
    except RunError as error:
        notes[kind.FILE] = f"{error}: {otherwise}."
    return kind()


def _rows(folder: Path, kind: type[AnyRow], notes: dict[str, str], otherwise: str) -> list[AnyRow]:
    name = kind.FILE
    try:
        found = logs.read(folder / name, kind)
    except RunError as error:
        notes[name] = f"{error}: {otherwise}."
        return []
    torn = len(found.unreadable) + found.torn_end
    if not (folder / name).exists():
        notes[name] = f"No {name}: {otherwise}."
    elif torn:
        notes[name] = f"{name}: {torn} unreadable line{'s' if torn > 1 else ''} left out."
    elif not found.rows:
        notes[name] = f"{name} is empty: {otherwise}."
    return found.rows


# runs to compare with


def _compared(run: Run, name: str) -> Compared:
    try:
        folder = next((path for path in _places(run, name) if path.is_dir()), None)
        other = _read_parts(folder) if folder else None
    except NotFound as error:
        return Compared(name, obstacle=f"{error}.")
    except OSError:  # a name that no folder can have
        other = None
    if other is None:
        missing = f"{name} is to be compared, but there is no such run folder."
        return Compared(name, obstacle=missing)
    ours, theirs = (one.scores.get("student") for one in (run, other))
    beside = Compared(other.name, method_of(other.recipe, run.recipe), theirs)
    if ours is None or theirs is None:
        which = run.name if ours is None else other.name
        why = f"{which} has no score, so {run.name} and {other.name} are not compared."
        return replace(beside, obstacle=why)
    try:
        return replace(beside, difference=compare(ours, theirs))
    except DataError:
        why = f"{other.name} was scored on other problems, so it is not compared with {run.name}."
        return replace(beside, obstacle=why)


def _places(run: Run, name: str) -> list[Path]:
    """Where a compared run may lie: from the working folder, as all paths of a recipe, or from the
    run's own.
    """
    return [Path(name), run.folder / name]


def method_of(recipe: Recipe | None, reference: Recipe | None) -> str:
    """A recipe by what sets it apart from another: "same recipe with kd_weight = 0.0"."""
    if not recipe or not reference:
        return "its recipe is not known"
    ours, theirs = (one.model_dump(mode="json") for one in (recipe, reference))
    changes = [
        f"{table}.{name} = {json.dumps(value)}"
        if name in ("model", "revision")
        else f"{name} = {json.dumps(value)}"
        for table, fields in ours.items()
        for name, value in fields.items()
        if (table, name) not in NOT_THE_METHOD
        and value != theirs[table][name]
        and any(is_read(one, f"{table}.{name}") for one in (recipe, reference))
    ]
    more = f" and {counted(len(changes) - 4, 'more change')}" if len(changes) > 4 else ""
    return f"same recipe with {', '.join(changes[:4])}{more}" if changes else "same recipe"


# how near the teacher


def kl_before_after(run: Run) -> tuple[float | None, float | None]:
    """KL to the teacher on held-out tokens of the supervised segments: before training (step 0) and
    at the step whose weights became the student (else the last); None where it was not measured, or
    which segments are supervised is not known.
    """
    names = run.recipe.objective.segments if run.recipe else ()
    return before_after(run, lambda row: _supervised_kl(row.numbers, names))


def before_after(
    run: Run, measure: Callable[[ValidationRow], float | None]
) -> tuple[float | None, float | None]:
    """What was measured on held-out sequences before training and at the student's step."""
    measured = {row.step: measure(row) for row in run.validation}
    known = {step: value for step, value in measured.items() if value is not None}
    exported = run.manifest.exported_step
    step = max(known, default=0) if exported is None else exported
    return known.get(0), known.get(step)


def _supervised_kl(measured: Mapping[str, float], segments: tuple[str, ...]) -> float | None:
    """The mean over the tokens of these segments."""
    names = [name for name in segments if {f"kl_{name}", f"tokens_{name}"} <= measured.keys()]
    tokens = sum(measured[f"tokens_{name}"] for name in names)
    total = sum(measured[f"kl_{name}"] * measured[f"tokens_{name}"] for name in names)
    return total / tokens if tokens else None
