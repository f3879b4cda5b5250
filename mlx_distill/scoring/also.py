"""The further tasks of a run's `[eval]`: each model that is scored on the first one answers them too.

In: a run folder with its student, and a task. Out: a score and generations a model in `evals/` of
the run. Decided here: that a score which is kept of the same model and settings is not made again.
"""

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend
from mlx_distill.errors import DistillError
from mlx_distill.readers import read_json
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.generations import Evaluation
from mlx_distill.scoring.of_run import generations_of, score_part, scored_models
from mlx_distill.scoring.score import Score, describe
from mlx_distill.verify.tasks import Task
from mlx_distill.view import View


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
        with Evaluation.opened(folder.path / "evals", name, task, settings, made_by) as kept:
            score = _kept(kept)
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


def _kept(kept: Evaluation) -> Score | None:
    """The score in a result file; None where there is none that can be read."""
    try:
        return Score.model_validate(read_json(kept.result, kept.result.name)["score"])
    except (DistillError, OSError, ValueError, KeyError, TypeError):
        return None
