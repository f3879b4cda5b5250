"""The straight line: recipe → examples → sequences → steps → training → student → scores → report.

Each stage leaves its result in the run folder and is skipped where that is complete, so the same
call also continues a run that was stopped anywhere.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from mlx_distill.backends import choose_backend
from mlx_distill.backends.export import not_for_mlx_lm
from mlx_distill.backends.failures import explained
from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, LiveTeacher, Model, Student, Teacher
from mlx_distill.cost.flops import flops_counter, total_flops
from mlx_distill.cost.kept_answers import Kept
from mlx_distill.data.batches import Steps, validation_batches
from mlx_distill.data.day import about_day, day_of_run
from mlx_distill.data.detection import with_format
from mlx_distill.data.prepare import Chosen, Prepared, choose, learnable
from mlx_distill.data.sequences import TokenSequence, stop_ids
from mlx_distill.errors import DeviceStopped, OutOfMemory, RecipeError
from mlx_distill.exporting.card import write_card
from mlx_distill.machine import Machine
from mlx_distill.pruning.of_recipe import PrunedBase
from mlx_distill.pruning.thinning import Thinning
from mlx_distill.recipe.load import load_kept_recipe
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.reporting.runs_page import report
from mlx_distill.runs import logs
from mlx_distill.runs.disk import refuse_full_disk
from mlx_distill.runs.inputs import begin, refuse_older_arithmetic
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.provenance import make_start
from mlx_distill.runs.rows import MetricsRow
from mlx_distill.runs.run_folder import RunFolder, SilentFolder, TrainState
from mlx_distill.runs.sample import make_sample
from mlx_distill.runs.trackers import followed, refuse_absent
from mlx_distill.scoring.also import score_also
from mlx_distill.scoring.of_run import score_run
from mlx_distill.scoring.task_scores import TaskScores, changed_generations, forget_score
from mlx_distill.signals import asked_to_stop
from mlx_distill.teaching.cached_teacher import CachedTeacher
from mlx_distill.teaching.folder import TeacherCache
from mlx_distill.teaching.kept_answers import KeptAnswers
from mlx_distill.teaching.of_recipe import asked_of_teacher, days_of, filled, kept_in_memory
from mlx_distill.terminal.last_words import last_words
from mlx_distill.terminal.plan import announce, shortage, student_config
from mlx_distill.training.loop import Source, Training, restore
from mlx_distill.verify.tasks import Task, tasks_of
from mlx_distill.view import View, silent
from mlx_distill.words import amount
from mlx_distill.writing.of_recipe import Rollouts, refuse_ranks


def run(
    recipe: Recipe, view: View, backend_name: str = "auto", fresh: bool = False, force: bool = False
) -> Path:
    """Run a recipe to its report, or continue it; returns the run folder. Raises `DistillError` or
    `Interrupted`.

    A run whose plan does not fit the machine is refused (`OutOfMemory`), unless `force`.
    """
    recipe = with_format(recipe)
    backend = choose_backend(backend_name)
    pipeline = Pipeline(recipe, view, backend)
    with held_folder(recipe, backend, fresh, pipeline.view.say) as folder:
        pipeline.run(folder, force)
        return folder.path


def score(
    folder: RunFolder, settings: Sequence[str], view: View, backend_name: str = "auto"
) -> None:
    """Score a finished run where it lies, by its own recipe and `field=value` settings of its
    `[eval]` table, and write its report again. Raises `DistillError`.
    """
    path = folder.path.resolve()
    changes = tuple(f"eval.{setting}" for setting in settings)
    recipe = load_kept_recipe(path / "recipe.toml", changes)
    if not recipe.eval.task:
        raise RecipeError(
            f"{folder.path}: the run's recipe has no [eval] task: name one, for example "
            "--set task=gsm8k:PATH"
        )
    if RunFolder.of(recipe).path.resolve() != path:  # it was moved
        recipe = with_values(recipe, run={"folder": str(path.parent), "name": path.name})
    run(recipe, view, backend_name)


@contextmanager
def held_folder(
    recipe: Recipe, backend: Backend, fresh: bool, say: Callable[[str], None]
) -> Iterator[RunFolder]:
    """The run's folder, held by the first rank, which makes it or refuses; then the others look at
    it.
    """
    kind = RunFolder if backend.ranks.first else SilentFolder
    with kind.held(recipe, fresh, say) as folder:
        backend.all_sum(np.zeros(1))
        yield folder


class Pipeline:
    """One recipe on one backend: its models' folders, and the stages in order."""

    def __init__(self, recipe: Recipe, view: View, backend: Backend):
        self.recipe, self.backend = recipe, backend
        self.view = view if backend.ranks.first else silent()
        self.pair = Pair.of(recipe)
        self.pair.refuse_formats(backend.name)
        self.stop_ids = sorted(stop_ids(self.pair.tokenizer))  # of the exported student
        self.day = ""  # what prompts say: see `choose_day`
        self.rollouts: Rollouts | None = None  # see `prepare`
        self.thinning: Thinning | None = None  # see `_train`

    def run(self, folder: RunFolder, force: bool) -> None:
        """All stages."""
        refuse_absent(self.recipe.run.track)
        self.choose_day(folder.kept_day())
        self.announce()
        tasks = self._tasks()
        student_config(self.recipe, self.pair.student)  # refuses before anything is written
        self.prune()
        if folder.has_student():
            self._say_damage(folder)
        else:
            refuse_older_arithmetic(folder, self.pair)
            self._learn(folder, force)
        self.backend.part()
        self.backend.release()
        if self.backend.ranks.first:
            for index, task in enumerate(tasks):
                scored = score_also if index else score_run
                scored(folder, self.pair, task, self.day, self.backend, self.view)
            self._finish(folder)

    def choose_day(self, kept: str) -> None:
        """Choose the day that all prompts say; the first rank chooses for all."""
        runs = RunFolder.of(self.recipe).path.parent
        days = partial(days_of, self.pair)
        day = day_of_run(self.recipe.data, self.pair.tokenizer, kept, days, runs)
        if day:
            number = datetime.date.fromisoformat(day).toordinal() * self.backend.ranks.first
            number = int(self.backend.all_sum(np.array([float(number)]))[0])
            self.day = datetime.date.fromordinal(number).isoformat()

    def announce(self) -> None:
        """Say where this runs, and which day prompts say."""
        device, asked = self.backend.device(), self.recipe.student.compute_dtype
        dtype, reason = device.dtype, device.reason
        if asked not in ("auto", dtype):
            dtype, reason = asked, "student.compute_dtype asks for it"
        self.view.say(f"backend {device.backend} on {device.device}, {dtype}: {reason}")
        if device.advice:
            self.view.say(f"note: {device.advice}")
        if self.day:
            self.view.say(about_day(self.day))

    def _tasks(self) -> list[Task]:
        """Read before anything is trained, so that one that cannot be used is refused."""
        return tasks_of(self.recipe.eval)

    def _say_damage(self, folder: RunFolder) -> None:
        """The owner of a file that was changed may have meant it; such a student is not scored as
        this run's.
        """
        manifest, student = folder.read(Manifest), folder.exported
        damage = student.damage()
        wrong = [damage and f"{damage}; {student.remedy}"]
        wrong += logs.changes(folder.path, manifest.logs).values()
        if manifest.finished:
            wrong.append(changed_generations(folder.path, folder.readable(TaskScores)))
        for sentence in filter(None, wrong):
            self.view.say(f"note: {sentence}")

    def prepare(self) -> Prepared:
        """The sequences of this run, after a model has written what it is to write."""
        if self.recipe.rollouts.by == "data":
            return learnable(self._chosen, self.recipe)
        self.rollouts = Rollouts(self.pair, self._chosen, self.day)
        return self.rollouts.written(self._load_writer, self.backend, self.view)

    @cached_property
    def _chosen(self) -> Chosen:
        """The run's examples, read and rendered once; the day must have been chosen."""
        return choose(self.recipe, self.pair.tokenizer, self.day)

    def prune(self) -> Path:
        """Cut the student's base as the recipe says; the folder, which the student begins as."""
        if self.recipe.prune.cuts:
            texts = self.prepare().measured if self.recipe.prune.before.measures else ()
            base = PrunedBase(self.pair, texts)
            self.pair = replace(
                self.pair, student=base.made(self._load_base, self.backend, self.view)
            )
        return self.pair.student

    # training

    def _learn(self, folder: RunFolder, force: bool) -> None:
        """From sequences to the exported student."""
        prepared = self.prepare()
        for note in prepared.notes:
            self.view.say(note)
        device = self.backend.device()
        planned = self.recipe, prepared, self.pair.student, self.pair.teacher, Machine.of(device)
        announce(*planned, self.view.say, force, self.backend.ranks.size)
        self._say_mlx_lm()
        try:
            with explained("training"):
                student, state = self._train(folder, prepared)
                self._export(folder, student, state)
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {folder.what_is_saved()}; {shortage(*planned)}") from None
        except DeviceStopped as error:
            raise DeviceStopped(f"{error}; {folder.what_is_saved()}") from None

    def _say_mlx_lm(self) -> None:
        """Why mlx-lm will not open a student that torch trains; MLX itself refuses those."""
        if self.backend.device().backend != "torch":
            return
        if reason := not_for_mlx_lm(self.pair.student):
            self.view.say(
                "note: the student will open in transformers alone, mlx-lm cannot load its base: "
                f"{reason}"
            )

    def _train(self, folder: RunFolder, prepared: Prepared) -> tuple[Student, TrainState]:
        recipe = self.recipe
        source = self._source(folder, prepared, lambda: student)
        cached = self._cached_teacher(prepared)
        kept_answers = cached.cache.fields.name if cached else ""
        device, say = self.backend.device(), self.view.say
        inputs = begin(folder, self.pair, prepared, len(source), device, kept_answers, say)
        if not recipe.rollouts.refresh_every:  # else the student has yet to write it
            folder.write(make_sample(prepared, recipe, self.pair.tokenizer))
        kept = kept_in_memory(self.pair, prepared, self.backend)
        student, teacher = self._load_models(cached, kept)
        refuse_full_disk(folder, recipe.run, student, len(source))
        if recipe.prune.thins:
            self.thinning = Thinning(self.pair, prepared.measured, len(source), self.backend)
            say(self.thinning.words)
        with asked_to_stop() as asked, self.backend.training_limits():
            training = Training(
                recipe,
                self.backend,
                student,
                teacher,
                source,
                validation_batches(prepared.validation, recipe.batch),
                folder,
                self.view,
                flops_counter(recipe, self.pair.teacher, self.pair.student, kept.training),
                inputs,
                asked.is_set,
                self.thinning,
            )
            with self._tracked(folder):
                return student, training.train()

    def _tracked(self, folder: RunFolder) -> AbstractContextManager[None]:
        """Trackers follow the logs that the first rank writes."""
        run = self.recipe.run
        names = run.track if self.backend.ranks.first else ()
        created = folder.readable(Manifest).created
        config = {"created": created, "digest": self.recipe.digest(), "recipe": self.recipe.toml()}
        return followed(folder.path, run.name, names, config, self.view.say)

    def _source(
        self, folder: RunFolder, prepared: Prepared, student: Callable[[], Student]
    ) -> Source:
        """The steps: over rows that lie there, or over what the student writes as it learns."""
        recipe = self.recipe
        if self.rollouts and recipe.rollouts.refresh_every:
            refuse_ranks(recipe, self.backend.ranks.size)
            return self.rollouts.source(student, folder.path, self.view.say)
        return Steps(
            prepared.train,
            recipe.objective.segments,
            recipe.batch,
            recipe.run.seed,
            recipe.optim.epochs,
            recipe.optim.steps,
            recipe.selection,
        )

    def _cached_teacher(self, prepared: Prepared) -> CachedTeacher | None:
        """A teacher that answers from the cache; what the cache lacks of training and validation is
        asked of the real one first. None where the recipe keeps no answers.
        """
        if self.recipe.teacher.cache == "off":
            return None
        cached = CachedTeacher(self.fill_cache(asked_of_teacher(prepared)), self.backend)
        if self.recipe.asks_cache_for_the_text:
            cached.refuse_unknown_targets(prepared.train, self.recipe.objective.segments)
        return cached

    def fill_cache(self, sequences: Sequence[TokenSequence]) -> TeacherCache:
        """The recipe's cache, with the teacher's answers to these sequences."""
        made = make_start(self.backend.device(), 0).content()
        return filled(
            self.pair, self.day, sequences, self._load_teacher, self.backend, made, self.view
        )

    def _load_models(
        self, cached: CachedTeacher | None, kept: Kept
    ) -> tuple[Student, Teacher | None]:
        name = self.recipe.student.model
        student = self.backend.load_student(self.pair.student, name, self.recipe)
        self._say_notes(student)
        if not self.pair.teacher:
            return student, None
        live = None if cached else self._load_teacher()
        teacher: Teacher | None = cached or live
        if live and kept.sequences:
            teacher = KeptAnswers(live, self.backend, kept.sequences, self.recipe.batch)
            size = amount(kept.bytes, "B")
            self.view.say(f"the teacher's answers are kept in memory: {size}, each asked once")
        assert teacher is not None
        compared = self.pair.common_rows(teacher.vocabulary_rows, student.vocabulary_rows)
        student.compare_first(compared)
        if cached:
            cached.refuse_other_rows(compared)
        if self.recipe.objective.hidden_weight:
            student.match_hidden(live)
        return student, teacher

    def _load_teacher(self) -> LiveTeacher:
        asked = self.recipe.teacher
        folder, _ = self.pair.named_teacher()
        teacher = self.backend.load_teacher(
            folder, asked.model, asked.quantize_bits, asked.compute_dtype
        )
        self._say_notes(teacher)
        return teacher

    def _load_writer(self) -> Model:
        """Who writes once: the teacher, or the student as it is before training."""
        if self.recipe.rollouts.by == "teacher":
            return self._load_teacher()
        return self._load_base(self.recipe.student.quantize_bits)

    def _load_base(self, quantize_bits: int | str = 0) -> LiveTeacher:
        """The student as it is before training, or what it is made of."""
        asked = self.recipe.student
        return self.backend.load_teacher(
            self.pair.student, asked.model, quantize_bits, asked.compute_dtype
        )

    def _say_notes(self, model: Model) -> None:
        for note in model.notes:
            self.view.say(f"note: {note}")

    # what comes of it

    def _export(self, folder: RunFolder, student: Student, state: TrainState) -> None:
        """Write the student; where it lies, training is complete, so it comes last."""
        exported = state.best_step if self.recipe.run.export == "best" else state.step
        if exported != state.step:
            restore(student, folder.checkpoint(exported), optimizer=False)
        counted = [state.flops] if state.flops else [row.flops for row in folder.rows(MetricsRow)]
        folder.update(
            Manifest,
            exported_step=exported,
            trained_steps=state.step,
            elapsed_seconds=state.elapsed_seconds,
            tokens_read=state.tokens_seen,
            loss_tokens=state.loss_tokens_seen,
            flops=total_flops(counted),
            logs=logs.kept_digests(folder.path),
        )
        if self.rollouts:
            self.rollouts.leave_account(folder, self.view.say)
        forget_score(folder, "student")
        if self.thinning:
            folder.write_student(partial(self.thinning.export, student, self.stop_ids))
        else:
            folder.write_student(lambda path: student.export(path, self.stop_ids))
        self.view.say(f"student written to {folder.student} (step {exported})")

    def _finish(self, folder: RunFolder) -> None:
        folder.update(Manifest, finished=True)
        if note := write_card(folder):
            self.view.say(f"note: {note}")
        report([folder.path], folder.path)
        last_words(folder, self.recipe, self.view)
