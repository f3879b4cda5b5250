"""What a run ends with on the terminal: its scores in a table, and what to do with the student.

In: a finished run. Out: lines of at most 80 columns, but for paths.
"""

from rich.table import Table

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.reporting.commands import ask_command, score_command
from mlx_distill.reporting.written import MODELS
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.also import further_scores
from mlx_distill.scoring.finishing import unfinished_note, unseen_note
from mlx_distill.scoring.score import Score
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.scoring.unrounded import unrounded_note
from mlx_distill.view import View
from mlx_distill.words import number, percent

NOTES = (unfinished_note, unseen_note, unrounded_note)


def last_words(folder: RunFolder, recipe: Recipe, view: View) -> None:
    """Say how student, base and teacher did, where the report lies, and what can be typed next."""
    scores = folder.readable(TaskScores).whole
    if scores:
        view.console.print(score_table(scores))
    for one in further_scores(folder.path, recipe.eval):
        view.say(f"on {one.task}:")
        view.console.print(score_table(one.scores))
        _say_notes([unfinished_note(recipe, one.scores)], view)
    _say_notes([note(recipe, scores) for note in NOTES], view)
    view.say(f"report: {folder.path / 'report.html'}")
    if "student" not in scores:
        view.say(f"score it: {score_command(folder.path, recipe)}")
    view.say(f"try it: {ask_command(folder.path)}")


def _say_notes(notes: list[str], view: View) -> None:
    for note in filter(None, notes):
        view.say(f"note: {note}")


def score_table(scores: dict[str, Score]) -> Table:
    """A row for each model that was scored: the student before and after, and its teacher."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("model", "right", "95\u00a0% interval", "unfinished", "tokens an answer"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model, label in MODELS.items():
        if score := scores.get(model):
            interval = f"{percent(score.low)} to {percent(score.high)}"
            cells = percent(score.accuracy), interval, percent(score.unfinished)
            table.add_row(label, *cells, number(score.mean_tokens, places=0))
    return table
