"""Scoring a run: teacher, base and student each answer the recipe's task once.

In: a run folder with its student. Out: `eval.json`, after each model, and `generations.jsonl`.
Decided here: what is kept of an earlier scoring, and that no model is scored that is not the one
the run began with, or wrote.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, Model, Sampling
from mlx_distill.backends.stops import stops_of
from mlx_distill.runs.inputs import refuse_changed_model, refuse_older_arithmetic
from mlx_distill.runs.provenance import identity
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring import score as scoring
from mlx_distill.scoring.generations import FILE, Generations
from mlx_distill.scoring.score import Score, describe
from mlx_distill.scoring.shared import SharedGenerations
from mlx_distill.scoring.task_scores import GenerationsFile, TaskScores
from mlx_distill.verify.tasks import Task
from mlx_distill.view import View

CHANGED = "{} has other problems now than when it was scored: it is scored again"


@dataclass(frozen=True)
class ScoredModel:
    """One of a run's models: its part ("teacher", "base", "student"), where it lies, and to how many
    bits it is quantised on load, 0 for as stored.
    """

    part: str
    path: Path
    bits: int | str = 0

    def refuse_changed(self, folder: RunFolder, pair: Pair) -> None:
        """Raises `RunError` for a model that is not the one of this run any more."""
        refuse_older_arithmetic(folder, pair)
        if self.part == "student":
            folder.exported.refuse_changed()
        else:
            role = "student" if self.part == "base" else self.part
            refuse_changed_model(folder, role, self.path, self.part)

    def made_by(self, pair: Pair, backend: Backend) -> dict[str, Any]:
        """What its texts depend on beside task and settings."""
        made = identity(self.path) | {"bits": self.bits, "backend": backend.name}
        return made | pair.asked_dtype(self.part)


class LoadedWhenAsked:
    """A model that is not loaded where all of its answers are kept."""

    def __init__(self, load: Callable[[], Model]):
        self._load = load

    @cached_property
    def _model(self) -> Model:
        return self._load()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """As the model does."""
        return self._model.generate(prompts, sampling)


def score_run(
    folder: RunFolder, pair: Pair, task: Task, day: str, backend: Backend, view: View
) -> None:
    """Score what is not scored yet and say all scores; one that is kept is not made again, nor is a
    kept generation. Raises `RunError` for a model that changed.
    """
    scores = _kept_scores(folder, task, view)
    for part, score in scores.items():
        view.say(f"{part}: {describe(score)}")
    missing = [one for one in scored_models(folder, pair) if one.part not in scores]
    if missing:
        view.say(task.describe())
        if short := task.short_of_tokens(pair.recipe.eval.max_new_tokens):
            view.say(f"note: {short}")
    for model in missing:
        model.refuse_changed(folder, pair)
        made_by = model.made_by(pair, backend)
        generations = generations_of(model, folder.path / FILE, made_by, backend, view)
        score = scores[model.part] = score_part(model, pair, task, day, backend, view, generations)
        view.say(f"{model.part}: {describe(score)}")
        folder.write(
            TaskScores(
                task=task.name,
                compared=task.compared(),
                prompt=task.prompt,
                answer=task.answer,
                problems=task.digest,
                generations=GenerationsFile(**generations.reference()),
                scores={**scores},
            )
        )
        backend.release()


def score_part(
    model: ScoredModel,
    pair: Pair,
    task: Task,
    day: str,
    backend: Backend,
    view: View,
    generations: Generations,
) -> Score:
    """Ask one of a run's models, which is loaded for it, as the run's `[eval]` says."""
    settings, part = pair.recipe.eval, model.part
    computed = pair.recipe.teacher if part == "teacher" else pair.recipe.student
    dtype = computed.compute_dtype
    found = scoring.score(
        LoadedWhenAsked(lambda: backend.load_teacher(model.path, part, model.bits, dtype)),
        pair.tokenizer,
        task,
        settings,
        view.count(f"scoring {part}", len(task.problems) * settings.samples),
        stops(pair, part, model.path),
        day,
        generations,
    )
    if isinstance(generations, SharedGenerations):
        generations.share()
    return found


def generations_of(
    model: ScoredModel,
    path: Path,
    made_by: dict[str, Any],
    backend: Backend,
    view: View,
    name: str = "",
) -> Generations:
    """A model's generations in a file under a name, its part where none is given; those of teacher
    and base are shared with other runs.
    """
    arguments = path, name or model.part, made_by, view.say
    if model.part == "student":
        return Generations(*arguments)
    return SharedGenerations(*arguments).computed_by(backend)


def stops(pair: Pair, part: str, path: Path) -> frozenset[int]:
    """Where texts of the teacher, the base or the student end; only the teacher has a tokenizer of
    its own.
    """
    own = [pair.teacher_tokenizer] if part == "teacher" else []
    return stops_of(path, pair.tokenizer, *own)


def scored_models(folder: RunFolder, pair: Pair) -> Iterator[ScoredModel]:
    """What is scored, the student last."""
    settings = pair.recipe.eval
    if pair.teacher and settings.score_teacher:
        yield ScoredModel("teacher", pair.teacher, pair.recipe.teacher.quantize_bits)
    if settings.score_base:
        yield ScoredModel("base", pair.student, pair.recipe.student.quantize_bits)
    yield ScoredModel("student", folder.student)


def _kept_scores(folder: RunFolder, task: Task, view: View) -> dict[str, Score]:
    """Those of eval.json that can be read and are of these problems; of the others it is said that
    they are made again.
    """
    kept = folder.readable(TaskScores, view.say, "what it held is scored again")
    if kept.scores and kept.problems not in ("", task.digest):
        view.say(f"note: {CHANGED.format(task.name)}")
        return {}
    for part in kept.broken:
        view.say(
            f"note: {folder.path / kept.FILE}: the score of the {part} is incomplete "
            "and is made again"
        )
    return kept.whole
