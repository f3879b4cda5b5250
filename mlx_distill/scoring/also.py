"""The further tasks of a run's `[eval]`: each model that is scored on the first one answers them too.

In: a run folder with its student, and a task. Out: a score and generations a model in `evals/` of
the run, and what lies there, read again. Decided here: that a score which is kept of the same model
and settings is not made again, and that those of other settings are not the run's any more.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend
from mlx_distill.errors import DistillError
from mlx_distill.models.hub import model_fingerprint
from mlx_distill.readers import read_json
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.generations import Evaluation
from mlx_distill.scoring.of_run import CHANGED, generations_of, score_part, scored_models
from mlx_distill.scoring.score import Score, describe
from mlx_distill.verify.tasks import Task
from mlx_distill.view import View

FOLDER = "evals"
PARTS = ("teacher", "base", "student")


@dataclass(frozen=True)
class Further:
    """What a run's models scored on a further task: by part; how the problem was put and where the
    answer was looked for; how many problems were compared in which way.
    """

    task: str
    prompt: str = ""
    answer: str = ""
    ways: dict[str, int] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)


def further_scores(folder: Path, settings: EvalTable) -> list[Further]:
    """By task, in the recipe's order, what the run's models scored with these settings; what cannot
    be read is left out, and what an earlier run in this folder left behind.
    """
    found: dict[str, Further] = {}
    wanted = json.loads(settings.model_dump_json())
    models = _fingerprints(RunFolder(folder)) if settings.also else {}
    for file in sorted(folder.glob(f"{FOLDER}/*.json"), key=lambda path: path.stat().st_mtime):
        content = _content(file)
        part = str(content.get("model", "")).rpartition("-")[2]
        score = _score(content)
        if part not in PARTS or score is None or content.get("settings") != wanted:
            continue
        if _fingerprint(content) != models.get(part):
            continue
        told = {key: content.get(key, "") for key in ("task", "prompt", "answer")}
        task = found.setdefault(told["task"], Further(**told, ways=content.get("compared", {})))
        task.scores[part] = score
    named = [name.partition(":")[0] for name in settings.also]
    order = {name: place for place, name in enumerate((*settings.also, *named))}
    return sorted(found.values(), key=lambda one: order.get(one.task, len(order)))


def _fingerprints(run: RunFolder) -> dict[str, str]:
    """By part, those of the models that the run began with, and of its student where it is there."""
    began = run.readable(Manifest).models
    found = {
        part: began[role].fingerprint
        for part, role in (("teacher", "teacher"), ("base", "student"))
        if role in began
    }
    with suppress(DistillError, OSError):
        found["student"] = model_fingerprint(run.student)
    return found


def _fingerprint(content: dict[str, Any]) -> Any:
    made_by = content.get("made_by")
    return made_by.get("fingerprint") if isinstance(made_by, dict) else None


def score_also(
    folder: RunFolder, pair: Pair, task: Task, day: str, backend: Backend, view: View
) -> dict[str, Score]:
    """The score of each of the run's models on a further task, kept or made."""
    settings, found = pair.recipe.eval, {}
    view.say(task.describe())
    if short := task.short_of_tokens(settings.max_new_tokens):
        view.say(f"note: {short}")
    for model in scored_models(folder, pair):
        made_by, name = model.made_by(pair, backend), f"{folder.path.name}-{model.part}"
        with Evaluation.opened(folder.path / FOLDER, name, task, settings, made_by) as kept:
            score = _kept(kept, task, view)
            if score is None:
                model.refuse_changed(folder, pair)
                path = kept.generations
                generations = generations_of(model, path, made_by, backend, view, name)
                score = score_part(model, pair, task, day, backend, view, generations)
                kept.write(score.content(), generations.reference())
                backend.release()
        found[model.part] = score
        view.say(f"{model.part} on {task.name}: {describe(score)}")
    return found


def _kept(kept: Evaluation, task: Task, view: View) -> Score | None:
    """The score in a result file; None where there is none that can be read, or of other problems."""
    content = _content(kept.result)
    if content.get("problems", task.digest) != task.digest:
        view.say(f"note: {CHANGED.format(task.name)}")
        return None
    return _score(content)


def _content(file: Path) -> dict[str, Any]:
    """What a result file says; nothing of one that cannot be read."""
    try:
        content = read_json(file, file.name)
    except (DistillError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _score(content: dict[str, Any]) -> Score | None:
    try:
        return Score.model_validate(content["score"])
    except (KeyError, ValueError):
        return None
