"""Scoring one model, or the student of a run, on any task: `mlx-distill eval`.

In: a name, a task, settings. Out: a score, kept beside the generations that it was made from.
"""

from pathlib import Path

from mlx_distill.backends import choose_backend
from mlx_distill.data.day import about_day
from mlx_distill.recipe.load import eval_table
from mlx_distill.runs.named import Named
from mlx_distill.runs.provenance import identity
from mlx_distill.scoring import score as scoring
from mlx_distill.scoring.generations import Evaluation, Generations
from mlx_distill.scoring.score import Score, describe
from mlx_distill.verify.tasks import task_of
from mlx_distill.view import View


def score_model(
    name: str,
    task_name: str,
    settings: tuple[str, ...],
    view: View,
    backend_name: str = "auto",
    out: Path | None = None,
) -> Score:
    """Score a model, or the student of a run folder, on a task; `settings` are `field=value` of the
    `[eval]` table.

    Score and generations are kept in `out`, by default the folder `evals` of the run, or of the
    working folder.
    """
    asked = Named.of(name)
    table = eval_table(settings)
    task = task_of(table, task_name)
    backend = choose_backend(backend_name)
    if asked.day:
        view.say(about_day(asked.day))
    model = backend.load_teacher(asked.folder, name)
    for note in model.notes:
        view.say(f"note: {note}")
    progress = view.count(f"scoring {name}", len(task.problems) * table.samples)
    made_by = identity(asked.folder) | {"backend": backend.name}
    view.say(task.describe())
    if short := task.short_of_tokens(table.max_new_tokens):
        view.say(f"note: {short}")
    kept_in = out or (asked.run.path if asked.run else Path()) / "evals"
    with Evaluation.opened(kept_in, name, task, table, made_by) as kept:
        generations = Generations(kept.generations, name, made_by, view.say)
        found = scoring.score(
            model, asked.tokenizer, task, table, progress, asked.stop_ids, asked.day, generations
        )
        kept.write(found.content(), generations.reference())
    view.say(f"{name} on {task.name}: {describe(found)}")
    view.say(f"kept: {kept.generations} and {kept.result.name}")
    return found
