"""A kept run: what a run folder holds, read for the report.

In: a run folder as `runs/run_folder.py` lays it out, finished or not. Out: a `Run` whose absent or
unreadable parts are empty, each with a line in `notes` that says so. Decided here: which files
count as broken, and where a run to compare with is looked for.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError, DistillError, NotFound, RunError
from mlx_distill.readers import parse_toml, path_of, read_json, read_text
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs import logs
from mlx_distill.runs.seals import SEALED, is_broken, unsealed
from mlx_distill.scoring.score import Difference, Score, compare
from mlx_distill.words import finite

SEGMENTS = ("prompt", "cot", "answer")
NOT_THE_METHOD = {
    ("run", "name"),
    ("run", "folder"),
    ("run", "checkpoint_every"),
    ("run", "keep_checkpoints"),
    ("eval", "compare"),
    ("eval", "batch_size"),
    ("eval", "score_teacher"),
    ("eval", "score_base"),
}

DEFAULTS = Recipe().model_dump(mode="json")  # with lists for tuples, as files have them


@dataclass(frozen=True)
class Run:
    """What a run folder holds; an absent part is empty and has a line in `notes`."""

    folder: Path
    recipe: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    task: str
    scores: dict[str, Score]
    sample: list[dict[str, Any]]
    notes: dict[str, str]
    ways: Any = None  # how many problems were compared as mathematics or as text, as eval.json says
    compared: list["Compared"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(
            self.recipe.get("run", {}).get("name") or self.manifest.get("name") or self.folder.name
        )


@dataclass(frozen=True)
class Compared:
    """Another run set beside this one.

    method: how its recipe differs; score: its student's; difference: this run's student minus that
    one; obstacle: a sentence that says why there is no difference, empty where there is one.
    """

    name: str
    method: str
    score: Score | None
    difference: Difference | None
    obstacle: str


def read_run(folder: Path) -> Run:
    """A run folder and the runs its recipe compares it with; raises `NotFound` where `folder` holds
    no run.
    """
    run = _read_parts(folder)
    named = run.recipe.get("eval", {}).get("compare", [])
    return Run(**{**vars(run), "compared": [_compared(run, str(other)) for other in named]})


def _read_parts(folder: Path) -> Run:
    path_of(str(folder), "run folder", NotFound)
    if not any((folder / name).is_file() for name in ("recipe.toml", "manifest.json")):
        what = (
            "holds neither recipe.toml nor manifest.json" if folder.is_dir() else "does not exist"
        )
        raise NotFound(f"no run in {folder}: it {what}; name a folder that `mlx-distill run` wrote")
    notes: dict[str, str] = {}
    recipe = _recipe(folder, notes)
    evaluation = _json(folder, "eval.json", dict, notes, "this run was not scored")
    sample = _json(folder, "sample.json", (list, dict), notes, "no example is shown")
    pieces = sample.get("pieces", []) if isinstance(sample, dict) else sample
    return Run(
        folder=folder,
        recipe=recipe,
        manifest=_json(
            folder, "manifest.json", dict, notes, "versions, machine, data and cost are not known"
        ),
        metrics=_json_lines(folder, "metrics.jsonl", notes, "there are no training curves"),
        validation=_json_lines(folder, "validation.jsonl", notes, "there are no validation curves"),
        task=str(evaluation.get("task", "")),
        scores=read_scores(evaluation.get("scores"), notes),
        sample=[
            piece
            for piece in pieces
            if isinstance(piece, dict) and piece.get("segment") in SEGMENTS
        ],
        notes=notes,
        ways=evaluation.get("compared"),
    )


def _recipe(folder: Path, notes: dict[str, str]) -> dict[str, dict[str, Any]]:
    try:
        text = read_text(folder / "recipe.toml", "recipe.toml")
        tables = parse_toml(text, "recipe.toml")
    except NotFound:
        notes["recipe.toml"] = "No recipe.toml: the recipe is not known."
    except DistillError as error:
        notes["recipe.toml"] = f"{error}: the recipe is not known."
    else:
        return _usable(tables, notes)
    return {}


def _usable(tables: dict[str, Any], notes: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The tables without fields that are not what a recipe has there; what no recipe has is kept,
    but as JSON has it.
    """
    kept: dict[str, dict[str, Any]] = {}
    for table, fields in json.loads(json.dumps(tables, default=str)).items():
        if not isinstance(fields, dict):
            notes[f"recipe.toml {table}"] = f"recipe.toml: {table} is no table and is left out."
            continue
        usual = DEFAULTS.get(table, {})
        kept[table] = {
            name: value for name, value in fields.items() if _alike(value, usual.get(name, value))
        }
        if left_out := sorted(set(fields) - set(kept[table])):
            notes[f"recipe.toml {table}"] = (
                f"recipe.toml: [{table}] {', '.join(left_out)} cannot be read and is left out."
            )
    return kept


def _alike(value: Any, usual: Any) -> bool:
    """Whether two values of JSON are of one kind; the elements of lists count, those of objects do
    not.
    """
    if isinstance(usual, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type(value) is not type(usual):
        return False
    return not isinstance(value, list) or all(
        isinstance(one, str) for one in value
    )  # recipes have lists of text alone


def _json(
    folder: Path, name: str, kind: type | tuple[type, ...], notes: dict[str, str], otherwise: str
) -> Any:
    empty = {} if kind is dict else []
    try:
        content = read_json(folder / name, name)
    except NotFound:
        notes[name] = f"No {name}: {otherwise}."
        return empty
    except DistillError as error:
        notes[name] = f"{error}: {otherwise}."
        return empty
    if not isinstance(content, kind):
        notes[name] = f"{name} holds a {type(content).__name__}: {otherwise}."
        return empty
    if name in SEALED and is_broken(content):
        notes[name] = f"{name} is not as the run wrote it: somebody changed it."
    return unsealed(content) if name in SEALED else content


def _json_lines(folder: Path, name: str, notes: dict[str, str], otherwise: str) -> list[dict]:
    try:
        found = logs.read(folder / name)
    except RunError as error:
        notes[name] = f"{error}: {otherwise}."
        return []
    if not (folder / name).exists():
        notes[name] = f"No {name}: {otherwise}."
        return []
    rows, torn = found.rows, len(found.unreadable) + found.torn_end
    if torn:
        notes[name] = f"{name}: {torn} unreadable line{'s' if torn > 1 else ''} left out."
    elif not rows:
        notes[name] = f"{name} is empty: {otherwise}."
    return rows


def read_scores(content: Any, notes: dict[str, str]) -> dict[str, Score]:
    """The scores of an eval.json that are whole; each other one has a line in `notes`."""
    scores = {}
    for model, fields in (content if isinstance(content, dict) else {}).items():
        try:
            scores[str(model)] = _score(fields)
        except (TypeError, ValueError, AttributeError):
            notes[f"eval.json {model}"] = (
                f"eval.json: the score of the {model} is incomplete and is left out."
            )
    if "student" not in scores and "eval.json" not in notes:
        notes["eval.json"] = "eval.json holds no score of the student."
    return scores


def _score(fields: Any) -> Score:
    score = Score.from_json(fields)
    numbers = [value for name, value in vars(score).items() if name != "correct"]
    marks = [mark for marks in dict(score.correct).values() for mark in marks]
    if (
        not score.correct
        or not all(score.correct.values())
        or len(finite(numbers, numbers)) < len(numbers)
    ):
        raise ValueError("no problems, or a field that is not a number")
    if len(finite(marks, marks)) < len(marks):
        raise ValueError("a mark that is not a number")
    return score


def _compared(run: Run, name: str) -> Compared:
    try:
        folder = next((path for path in _places(run, name) if path.is_dir()), None)
    except OSError:  # a name that no folder can have
        folder = None
    if folder is None:
        return Compared(
            name, "", None, None, f"{name} is to be compared, but there is no such run folder."
        )
    try:
        other = _read_parts(folder)
    except NotFound as error:
        return Compared(name, "", None, None, f"{error}.")
    theirs, method = other.scores.get("student"), method_of(other.recipe, run.recipe)
    ours = run.scores.get("student")
    if ours is None or theirs is None:
        which = run.name if ours is None else other.name
        return Compared(
            other.name,
            method,
            theirs,
            None,
            f"{which} has no score, so {run.name} and {other.name} are not compared.",
        )
    try:
        return Compared(other.name, method, theirs, compare(ours, theirs), "")
    except DataError:
        obstacle = (
            f"{other.name} was scored on other problems, so it is not compared with {run.name}."
        )
        return Compared(other.name, method, theirs, None, obstacle)


def _places(run: Run, name: str) -> list[Path]:
    """Where a compared run may lie: from the working folder, as all paths of a recipe, or from the
    run's own.
    """
    return [Path(name), run.folder / name]


def method_of(recipe: dict[str, dict], reference: dict[str, dict]) -> str:
    """A recipe by what sets it apart from another: "same recipe with kd_weight = 0.0"."""
    if not recipe or not reference:
        return "its recipe is not known"
    changes = [
        f"{table}.{name} = {json.dumps(value)}"
        if name in ("model", "revision")
        else f"{name} = {json.dumps(value)}"
        for table, fields in recipe.items()
        for name, value in fields.items()
        if (table, name) not in NOT_THE_METHOD and value != reference.get(table, {}).get(name)
    ]
    more = f" and {len(changes) - 4} more changes" if len(changes) > 4 else ""
    return f"same recipe with {', '.join(changes[:4])}{more}" if changes else "same recipe"


def kl_before_after(run: Run) -> tuple[float | None, float | None]:
    """KL to the teacher on held-out tokens of the supervised segments: before training (step 0) and
    at the step whose weights became the student (else the last); None where it was not measured.
    """
    known = dict(
        finite(
            [row["step"] for row in run.validation],
            [_supervised_kl(run, row) for row in run.validation],
        )
    )
    exported = finite([run.manifest.get("exported_step")], [0])
    step = exported[0][0] if exported else max(known, default=0.0)
    return known.get(0.0), known.get(step)


def _supervised_kl(run: Run, row: dict[str, Any]) -> float | None:
    names = run.recipe.get("objective", {}).get("segments") or SEGMENTS
    pairs = finite(
        [row.get(f"kl_{name}") for name in names], [row.get(f"tokens_{name}") for name in names]
    )
    tokens = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / tokens if tokens else None
