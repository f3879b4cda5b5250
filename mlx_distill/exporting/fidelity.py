"""What a quantised export lost: how far it is from the student as trained, and what it scores.

In: a run, an export in a format that is quantised. Out: KL and agreement over the run's held-out
texts, the accuracy on its task, and both as sentences. Decided here: a `.gguf` file is measured by
its own numbers, read back from the file and computed in float32; llama.cpp rounds activations, too.
What cannot be measured is said with the reason.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, LiveTeacher
from mlx_distill.backends.stops import stops_of
from mlx_distill.data.batches import validation_batches
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DistillError, ModelError
from mlx_distill.models.gguf.convert import write_weights
from mlx_distill.models.gguf.file import read_gguf
from mlx_distill.models.gguf.tensors import tensor_names
from mlx_distill.models.shards import INDEX, WEIGHT_FILES
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import StudentTable
from mlx_distill.runs.digests import all_files
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring import score as scoring
from mlx_distill.scoring.score import Difference, Score
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.verify.tasks import task_of
from mlx_distill.view import View
from mlx_distill.words import number, percent, points
from mlx_distill.writing.of_recipe import held_out_texts

FROM_THE_STUDENT = Objective(divergence="reverse_kl", kd_weight=1.0)  # KL(student ‖ export)


@dataclass(frozen=True)
class Fidelity:
    """kl: nats a token from the student's distribution to the export's; agreement: share of tokens
    with the same first choice; over `tokens` held-out ones of reasoning and answer. score,
    difference: on the run's task, and against the student's score. unknown: what was not measured,
    and why.
    """

    kl: float | None = None
    agreement: float | None = None
    tokens: int = 0
    score: Score | None = None
    difference: Difference | None = None
    unknown: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """For a person, and for the model card."""
        said = []
        if self.kl is not None and self.agreement is not None:
            said.append(
                f"KL to the unquantised student {number(self.kl)} nats a token, the same first "
                f"choice at {percent(self.agreement)} of {self.tokens:,} held-out tokens of "
                "reasoning and answer"
            )
        if self.score:
            score = self.score
            said.append(
                f"accuracy {percent(score.accuracy)} of {score.problems:,} problems (95\u00a0% "
                f"interval {percent(score.low)} to {percent(score.high)}){self._beside()}"
            )
        return [*said, *self.unknown]

    def numbers(self) -> dict[str, float | int]:
        """What is kept of them in `export.json`."""
        kept: dict[str, float | int | None] = {
            "kl": self.kl,
            "agreement": self.agreement,
            "tokens": self.tokens,
            "accuracy": self.score.accuracy if self.score else None,
            "accuracy_difference": self.difference.mean if self.difference else None,
        }
        return {name: value for name, value in kept.items() if value is not None}

    def _beside(self) -> str:
        if self.difference is None:
            return ""
        gap = self.difference
        return (
            f", {points(gap.mean)} points against the unquantised student ({points(gap.low)} to "
            f"{points(gap.high)}: {gap.verdict})"
        )


def measured(run: RunFolder, folder: Path, backend: Backend, view: View) -> Fidelity:
    """What the quantised export in `folder` lost against the student of `run`."""
    recipe = run.recipe()
    with _loadable(folder, run.student) as quantised:
        model = backend.load_teacher(quantised, "the export")
        score, why_no_score = _score(run, recipe, model, view)
        sums, why_no_kl = _divergence(run, recipe, model, backend)
    backend.release()
    before = run.readable(TaskScores).whole.get("student")
    difference = scoring.compare(score, before) if score and before else None
    unknown = tuple(filter(None, (why_no_kl, why_no_score)))
    if sums is None:
        return Fidelity(score=score, difference=difference, unknown=unknown)
    tokens = sums.tokens[1:].sum()  # the prompt is not what it writes
    kl, same = (float(sums.terms[name][1:].sum() / tokens) for name in ("kd", "agree"))
    return Fidelity(max(kl, 0.0), same, int(tokens), score, difference, unknown)


def _score(
    run: RunFolder, recipe: Recipe, model: LiveTeacher, view: View
) -> tuple[Score | None, str]:
    asked = recipe.eval
    if not asked.task:
        return None, "accuracy was not measured: the run's recipe has no [eval] task"
    try:
        task = task_of(asked)
        tokenizer = load_tokenizer(run.student)
        progress = view.count("scoring the export", len(task.problems) * asked.samples)
        stops = stops_of(run.student, tokenizer)
        return scoring.score(model, tokenizer, task, asked, progress, stops, run.kept_day()), ""
    except DistillError as error:
        return None, f"accuracy was not measured: {error}"


def _divergence(
    run: RunFolder, recipe: Recipe, model: LiveTeacher, backend: Backend
) -> tuple[LossSums | None, str]:
    try:
        batches = validation_batches(_held_out(run, recipe), recipe.batch)
        # as it lies there, whatever it learned with: rounded weights, a base of few bits
        as_stored = StudentTable(compute_dtype=recipe.student.compute_dtype)
        recipe = recipe.model_copy(update={"student": as_stored})
        student = backend.load_student(run.student, "the student", recipe)
    except DistillError as error:
        return None, f"KL was not measured: {error}"
    total = None
    for batch in batches:
        sums = student.score(batch, model.targets(batch), FROM_THE_STUDENT)
        total = sums if total is None else total + sums
    if total is None or not total.tokens[1:].sum():
        return None, "KL was not measured: the run keeps no text for validation"
    return total, ""


def _held_out(run: RunFolder, recipe: Recipe) -> tuple[TokenSequence, ...]:
    """The run's texts for validation; of a recipe whose texts are in its data no other model is
    asked for.
    """
    if recipe.rollouts.by == "data":
        pair = Pair(recipe, run.student, None, load_tokenizer(run.student), None)
    else:
        pair = Pair.of(recipe, weights=False)
    return held_out_texts(pair, run.kept_day())


@contextmanager
def _loadable(folder: Path, student: Path) -> Iterator[Path]:
    """A folder that a backend loads, of the numbers in the export."""
    file = next(folder.glob("*.gguf"), None)
    if file is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".measured-") as scratch:
        opened = read_gguf(file)
        left_out = {INDEX, *(path.name for path in student.glob(WEIGHT_FILES))}
        for name in all_files(student):
            if name not in left_out and "/" not in name:
                shutil.copyfile(student / name, Path(scratch) / name)
        try:
            write_weights(opened, tensor_names(opened), np.float32, Path(scratch))
        except OSError as error:
            raise ModelError(f"{file}: its numbers could not be read back ({error})") from error
        yield Path(scratch)
