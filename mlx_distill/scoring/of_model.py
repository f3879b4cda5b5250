"""Scoring one model, or the student of a run, on any task: `mlx-distill eval`.

In: a name, a task, settings. Out: a score, kept beside the generations that it was made from.
"""

from pathlib import Path

from mlx_distill.backends import choose_backend
from mlx_distill.backends.stops import stops_of
from mlx_distill.data.day import about_day, choose_day
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.recipe.load import eval_table
from mlx_distill.recipe.tables import DataTable
from mlx_distill.runs.named import run_at, weights_of
from mlx_distill.runs.provenance import identity
from mlx_distill.scoring import score as scoring
from mlx_distill.scoring.generations import Evaluation, Generations
from mlx_distill.scoring.score import Score, describe
from mlx_distill.verify.tasks import load_task
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
    run, folder = run_at(name), weights_of(name)
    table = eval_table(settings)
    task = load_task(task_name, table.examples, table.seed)
    tokenizer, backend = load_tokenizer(folder), choose_backend(backend_name)
    day = choose_day(DataTable(), tokenizer, [run.kept_day() if run else ""])
    if day:
        view.say(about_day(day))
    model = backend.load_teacher(folder, name)
    for note in model.notes:
        view.say(f"note: {note}")
    progress = view.count(f"scoring {name}", len(task.problems) * table.samples)
    made_by = identity(folder) | {"backend": backend.name}
    view.say(task.describe())
    kept_in = out or (run.path if run else Path()) / "evals"
    with Evaluation.opened(kept_in, name, task, table, made_by) as kept:
        generations = Generations(kept.generations, name, made_by, view.say)
        stops = stops_of(folder, tokenizer)
        found = scoring.score(model, tokenizer, task, table, progress, stops, day, generations)
        kept.write(found.content(), generations.reference())
    view.say(f"{name} on {task.name}: {describe(found)}")
    view.say(f"kept: {kept.generations} and {kept.result.name}")
    return found
