"""The straight line: recipe → examples → sequences → steps → training → student → scores → report.

Each stage leaves its result in the run folder and is skipped where that is complete, so the same
call also continues a run that was stopped anywhere.
"""

import datetime
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlx_distill.backends import choose_backend
from mlx_distill.backends.export import not_for_mlx_lm
from mlx_distill.backends.pair import refuse_pair
from mlx_distill.backends.protocol import Backend, LiveTeacher, Model, Student, Teacher
from mlx_distill.cost.flops import Adapters, Shape, step_flops, total_flops
from mlx_distill.cost.plan import kept_checkpoints
from mlx_distill.data.batches import Batch, Step, Steps, validation_batches
from mlx_distill.data.day import about_day, agreed_day, choose_day, shared_day
from mlx_distill.data.prepare import Prepared, prepare
from mlx_distill.data.sequences import TokenSequence, stop_ids
from mlx_distill.errors import CacheError, ModelError, NotFound, OutOfMemory, RecipeError, RunError
from mlx_distill.machine import Machine
from mlx_distill.models.folder import read_config
from mlx_distill.models.hub import load_tokenizer, model_fingerprint, model_folder
from mlx_distill.models.reading import reading_of
from mlx_distill.models.vocabulary import common_rows, head_rows
from mlx_distill.recipe.load import eval_table
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import DataTable
from mlx_distill.reporting.runs_page import report
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.provenance import identity, inputs_digest, make_manifest, make_start
from mlx_distill.runs.rows import MetricsRow
from mlx_distill.runs.run_folder import RunFolder, SilentFolder, TrainState
from mlx_distill.runs.sample import make_sample
from mlx_distill.scoring import score as evaluate
from mlx_distill.scoring.generations import FILE, Evaluation, Generations
from mlx_distill.scoring.stops import stops_of
from mlx_distill.scoring.task_scores import GenerationsFile, TaskScores, forget_score
from mlx_distill.signals import asked_to_stop
from mlx_distill.teaching.cached_teacher import CachedTeacher
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.fill import fill
from mlx_distill.teaching.folder import TeacherCache, dates_of
from mlx_distill.terminal.plan import announce, shortage
from mlx_distill.training.loop import Training, restore
from mlx_distill.verify.tasks import Task, load_task
from mlx_distill.view import View, silent


def run(
    recipe: Recipe, view: View, backend_name: str = "auto", fresh: bool = False, force: bool = False
) -> Path:
    """Run a recipe to its report, or continue it; returns the run folder. Raises `DistillError` or
    `Interrupted`.

    A run whose plan does not fit the machine is refused (`OutOfMemory`), unless `force`.
    """
    backend = choose_backend(backend_name)
    pipeline = Pipeline(recipe, view if backend.ranks.first else silent(), backend, force)
    with held_folder(recipe, backend, fresh, pipeline.view.say) as folder:
        pipeline.run(folder)
        return folder.path


def teach(recipes: Sequence[Recipe], view: View, backend_name: str = "auto") -> list[Path]:
    """Write or complete the teacher caches that recipes name, one pass for all that share one;
    returns the caches' folders.

    Raises `DistillError`.
    """
    for recipe in recipes:
        if recipe.teacher.cache == "off":
            raise RecipeError(
                f'{recipe.run.name}: [teacher] cache = "off" keeps nothing: set top_k, sampled or '
                "hidden, for example "
                "--set teacher.cache=top_k"
            )
    backend = choose_backend(backend_name)
    shared: dict[Path, list[Pipeline]] = {}
    for recipe in recipes:
        pipeline = Pipeline(recipe, view if backend.ranks.first else silent(), backend)
        pipeline.choose_day(shared_day(RunFolder.of(recipe).path.parent))
        shared.setdefault(pipeline.open_cache().path, []).append(pipeline)
    pipeline.announce()
    for pipelines in shared.values():
        whole = [sequence for one in pipelines for sequence in one.whole_sequences(one.prepare())]
        pipelines[0].fill_cache(whole)
    return list(shared)


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
    """One recipe on one backend: the models' folders, the student's tokenizer, and the stages in
    order.
    """

    def __init__(self, recipe: Recipe, view: View, backend: Backend, force: bool = False):
        self.recipe, self.view, self.backend, self.force = recipe, view, backend, force
        self.student_folder = model_folder(recipe.student.model, recipe.student.revision)
        self.teacher_folder = (
            model_folder(recipe.teacher.model, recipe.teacher.revision)
            if recipe.teacher.model
            else None
        )
        self.tokenizer = load_tokenizer(self.student_folder)
        self.stop_ids = sorted(stop_ids(self.tokenizer))
        self.teacher_tokenizer = refuse_pair(
            recipe, self.teacher_folder, self.student_folder, self.tokenizer
        )
        self.day = ""  # what prompts say: see `choose_day`

    def run(self, folder: RunFolder) -> None:
        self.choose_day(folder.kept_day())
        self.announce()
        settings = self.recipe.eval
        task = load_task(settings.task, settings.examples, settings.seed) if settings.task else None
        if not folder.has_student():
            self._refuse_older_arithmetic(folder)
            self._train_and_export(folder)
        elif (
            wrong := folder.exported.damage()
        ):  # its owner may have meant it; it is not scored as this run's
            self.view.say(f"note: {wrong}")
        self.backend.part()
        self.backend.release()
        if self.backend.ranks.first:
            if task:
                self._evaluate(folder, task)
            self._finish(folder)

    def announce(self) -> None:
        device = self.backend.device()
        self.view.say(
            f"backend {device.backend} on {device.device}, {device.dtype}: {device.reason}"
        )
        if device.advice:
            self.view.say(f"note: {device.advice}")
        if self.day:
            self.view.say(about_day(self.day))

    def choose_day(self, kept: str = "") -> None:
        """Choose the day that all prompts of this run say: the one with which it (or else its
        teacher cache) began.
        """
        day = choose_day(self.recipe.data, self.tokenizer, [kept])
        if not day:
            return
        if not (self.recipe.data.date or kept) and self.recipe.teacher.cache != "off":
            root = Path(self.recipe.teacher.cache_folder).expanduser()
            day = choose_day(
                self.recipe.data, self.tokenizer, [kept, *dates_of(root, self._cache_fields())]
            )
        if not (self.recipe.data.date or kept) and self.backend.ranks.first:
            day = agreed_day(RunFolder.of(self.recipe).path.parent, day)
        number = datetime.date.fromisoformat(day).toordinal() if self.backend.ranks.first else 0
        self.day = datetime.date.fromordinal(
            int(self.backend.all_sum(np.array([float(number)]))[0])
        ).isoformat()

    def prepare(self) -> Prepared:
        """The sequences of this run."""
        return prepare(self.recipe, self.tokenizer, self.day)

    # training

    def _train_and_export(self, folder: RunFolder) -> None:
        prepared = self.prepare()
        recipe = self.recipe
        planned = (
            recipe,
            prepared,
            self.student_folder,
            self.teacher_folder,
            Machine.of(self.backend.device()),
        )
        announce(*planned, self.view.say, self.force, self.backend.ranks.size)
        torchs_alone = self._why_torchs_alone()
        steps = Steps(
            prepared.train,
            recipe.objective.segments,
            recipe.batch,
            recipe.run.seed,
            recipe.optim.epochs,
            recipe.optim.steps,
        )
        try:
            cached = self.cached_teacher(prepared) if recipe.teacher.cache != "off" else None
            inputs = self._write_manifest(folder, prepared, len(steps), cached)
            validation = validation_batches(prepared.validation, recipe.batch)
            student, state = self._train(folder, steps, validation, cached, inputs)
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {folder.what_is_saved()}; {shortage(*planned)}") from None
        if self.recipe.run.export == "best" and state.best_step != state.step:
            restore(student, folder.checkpoint(state.best_step), optimizer=False)
        exported = state.best_step if self.recipe.run.export == "best" else state.step
        counted = (
            [row.flops for row in folder.rows(MetricsRow)] if state.flops is None else [state.flops]
        )
        folder.update(
            Manifest,
            exported_step=exported,
            elapsed_seconds=state.elapsed_seconds,
            tokens_read=state.tokens_seen,
            loss_tokens=state.loss_tokens_seen,
            flops=total_flops(counted),
            **torchs_alone,
        )
        forget_score(folder, "student")
        folder.write_student(
            lambda path: student.export(path, self.stop_ids)
        )  # last: where it lies, training is complete
        self.view.say(f"student written to {folder.student} (step {exported})")

    def _why_torchs_alone(self) -> dict[str, str]:
        """Say why mlx-lm will not open a student that torch trains, for the manifest too; MLX
        itself refuses those.
        """
        reason = (
            not_for_mlx_lm(self.student_folder) if self.backend.device().backend == "torch" else ""
        )
        if not reason:
            return {}
        self.view.say(
            "note: the student will open in transformers alone, mlx-lm cannot load its base: "
            f"{reason}"
        )
        return {"not_for_mlx_lm": reason}

    def _train(
        self,
        folder: RunFolder,
        steps: Steps,
        validation: list[Batch],
        cached: CachedTeacher | None,
        inputs: str,
    ) -> tuple[Student, TrainState]:
        student, teacher = self._load_models(cached)
        self._check_disk(folder, student, len(steps))
        training = Training(
            self.recipe,
            self.backend,
            student,
            teacher,
            steps,
            validation,
            folder,
            self.view,
            self._flops_counter(),
            inputs,
        )
        with asked_to_stop() as asked:
            training.stop_asked = asked.is_set
            return student, training.train()

    def cached_teacher(self, prepared: Prepared) -> CachedTeacher:
        """A teacher that answers from the cache; what the cache lacks of training and validation is
        asked of the real one first.
        """
        return CachedTeacher(self.fill_cache(self.whole_sequences(prepared)), self.backend)

    def whole_sequences(self, prepared: Prepared) -> tuple[TokenSequence, ...]:
        """All that a run may ask the teacher about."""
        return (*prepared.train_whole, *prepared.validation)

    def open_cache(self) -> TeacherCache:
        """The cache that the recipe names, as it is."""
        return TeacherCache(
            Path(self.recipe.teacher.cache_folder).expanduser(), self._cache_fields()
        )

    def fill_cache(self, whole: Sequence[TokenSequence]) -> TeacherCache:
        """The cache, after the teacher was asked for what it lacked of some whole sequences."""
        cache = self.open_cache()
        start = make_start(self.backend.device(), 0).content()
        made = {"teacher": self.recipe.teacher.model, **start}
        fill(
            cache,
            whole,
            self._load_teacher,
            self.backend,
            self.recipe.batch,
            made,
            self.view.say,
            self.view.count,
        )
        self.backend.release()
        examples, tokens, size = cache.size()
        self.view.say(
            f"teacher cache {cache.path}: {examples:,} sequences, {tokens:,} tokens, "
            f"{size / 1e6:,.1f} MB"
        )
        return cache

    def _cache_fields(self) -> CacheFields:
        teacher_rows, student_rows = (
            self._head_rows(folder) for folder in (self.teacher_folder, self.student_folder)
        )
        vocabulary = self.teacher_tokenizer.get_vocab()
        rows = common_rows(vocabulary, self.tokenizer.get_vocab(), teacher_rows, student_rows)
        rows = teacher_rows if self.recipe.teacher.cache == "hidden" else rows
        fingerprint, arithmetic = (
            model_fingerprint(self.teacher_folder),
            reading_of(self.teacher_folder),
        )
        return CacheFields.of(
            self.recipe.teacher, fingerprint, vocabulary, rows, self.day, arithmetic
        )

    @staticmethod
    def _head_rows(folder: Path) -> int:
        if rows := head_rows(folder):
            return rows
        raise ModelError(
            f"{folder / 'config.json'} has no vocab_size, which a teacher cache needs: set "
            'teacher.cache = "off"'
        )

    def _load_teacher(self) -> LiveTeacher:
        teacher = self.backend.load_teacher(
            self.teacher_folder, self.recipe.teacher.model, self.recipe.teacher.quantize_bits
        )
        self._say_notes(teacher)
        return teacher

    def _say_notes(self, model: Model) -> None:
        for note in model.notes:
            self.view.say(f"note: {note}")

    def _load_models(self, cached: CachedTeacher | None) -> tuple[Student, Teacher | None]:
        recipe = self.recipe
        student = self.backend.load_student(self.student_folder, recipe.student.model, recipe)
        self._say_notes(student)
        if not self.teacher_folder:
            return student, None
        teacher = cached or self._load_teacher()
        compared = common_rows(
            self.teacher_tokenizer.get_vocab(),
            self.tokenizer.get_vocab(),
            teacher.vocabulary_rows,
            student.vocabulary_rows,
        )
        student.compare_first(compared)
        if cached and recipe.teacher.cache != "hidden" and compared != teacher.vocabulary_rows:
            raise CacheError(
                f"{cached.cache.path}: vocabulary_rows {compared} asked, "
                f"{teacher.vocabulary_rows} found"
            )
        return student, teacher

    def _flops_counter(self) -> Callable[[Step], dict[str, float]]:
        """What a step costs by part, {} where a model is not a dense decoder of a known kind."""
        student = Shape.of(read_config(self.student_folder))
        kind = self.recipe.teacher.cache
        teaches = self.recipe.objective.kd_weight > 0 and kind in ("off", "hidden")
        teacher = Shape.of(read_config(self.teacher_folder)) if teaches else None
        if student is None or (teaches and teacher is None):
            return lambda step: {}
        kept = ("teacher",) if kind == "hidden" else ()  # its trunk's work was done before
        table = self.recipe.student
        full, again, adapters = (
            table.tuning == "full",
            table.gradient_checkpointing,
            Adapters.of(table, student),
        )
        return lambda step: {
            part: n
            for part, n in step_flops(step, teacher, student, full, again, adapters).items()
            if part not in kept
        }

    def _check_disk(self, folder: RunFolder, student: Student, steps: int) -> None:
        needed = (
            kept_checkpoints(self.recipe.run, steps) * student.state_bytes()
            + student.export_bytes()
        )
        needed -= sum(
            file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file()
        )
        free = shutil.disk_usage(folder.path).free
        if needed > free:
            raise RunError(
                f"{folder.path}: checkpoints and student need {needed / 1e9:.1f} GB more, "
                f"{free / 1e9:.1f} GB are free: free some, "
                'set run.folder to another disk, or run.keep_checkpoints = "last" with run.export '
                '= "last"'
            )

    def _write_manifest(
        self, folder: RunFolder, prepared: Prepared, steps: int, cached: CachedTeacher | None
    ) -> str:
        """Write or complete it; returns the digest of models and data, which checkpoints keep too.

        Raises `RunError` where these are not what the run began with.
        """
        kept = folder.readable(Manifest, self.view.say, "it is written again")
        last = folder.last_state(self.recipe.run.export == "best")
        manifest = make_manifest(
            self.recipe, self.backend.device(), self._models(), prepared, steps
        )
        if cached:
            manifest = manifest.model_copy(update={"teacher_cache": cached.cache.fields.name})
        if kept.models and kept.models != manifest.models:
            raise _changed(folder, "a model's files")
        if kept.data_digest not in ("", manifest.data_digest):
            raise _changed(folder, "the data")
        inputs = inputs_digest(manifest)
        if last.inputs_digest not in ("", inputs):
            raise _changed(folder, "a model's files or the data")
        folder.write(
            manifest.model_copy(
                update={name: getattr(kept, name) for name in kept.model_fields_set}
                | {"starts": [*kept.starts, make_start(self.backend.device(), last.step)]}
            )
        )
        folder.write(make_sample(prepared, self.recipe, self.tokenizer))
        return inputs

    # scoring

    def _evaluate(self, folder: RunFolder, task: Task) -> None:
        """Score teacher, base and student, each once; a score that is kept is not made again, nor
        is a kept generation.
        """
        scores = self._kept_scores(folder)
        if any(part not in scores for part, _, _ in self._scored(folder)):
            self.view.say(task.describe())
        for part, path, bits in self._scored(folder):
            if part in scores:
                continue
            self._refuse_older_arithmetic(folder)
            self._refuse_changed(folder, part)
            model = self.backend.load_teacher(path, part, bits)
            made_by = identity(path) | {"bits": bits, "backend": self.backend.name}
            generations = Generations(folder.path / FILE, part, made_by, self.view.say)
            scores[part] = self._score(model, task, part, self._stops(part, path), generations)
            folder.write(
                TaskScores(
                    task=task.name,
                    compared=task.compared(),
                    generations=GenerationsFile(**generations.reference()),
                    scores=scores,
                )
            )
            del model
            self.backend.release()

    def _kept_scores(self, folder: RunFolder) -> dict[str, evaluate.Score]:
        """Those of eval.json that can be read; of the others it is said that they are made again."""
        kept = folder.readable(TaskScores, self.view.say, "what it held is scored again")
        for part in kept.broken:
            self.view.say(
                f"note: {folder.path / kept.FILE}: the score of the {part} is incomplete "
                "and is made again"
            )
        return kept.whole

    def _refuse_older_arithmetic(self, folder: RunFolder) -> None:
        """Raises `RunError` for a run of a version that read a model's config.json as mlx-lm alone
        does, and so computed other numbers.
        """
        began = folder.readable(Manifest).models
        for role, (name, path) in self._models().items():
            if role in began and began[role].arithmetic != reading_of(path):
                raise RunError(
                    f"{folder.path}: this run was begun by a version that read the {role}'s "
                    f"config.json ({name}) otherwise, so its numbers "
                    "are not those of this version; start over with --fresh"
                )

    def _models(self) -> dict[str, tuple[str, Path]]:
        """Role → name in the recipe and folder."""
        models = {"student": (self.recipe.student.model, self.student_folder)}
        return models | (
            {"teacher": (self.recipe.teacher.model, self.teacher_folder)}
            if self.teacher_folder
            else {}
        )

    def _stops(self, part: str, path: Path) -> frozenset[int]:
        """Where texts of the teacher, the base or the student end; only the teacher has a tokenizer
        of its own.
        """
        own = [self.teacher_tokenizer] if part == "teacher" else []
        return stops_of(path, self.tokenizer, *own)

    def _refuse_changed(self, folder: RunFolder, part: str) -> None:
        """Raises `RunError` if a model that is to be scored is not the one that the run began with,
        or wrote.
        """
        if part == "student":
            folder.exported.refuse_changed()
            return
        role, path = (
            ("teacher", self.teacher_folder)
            if part == "teacher"
            else ("student", self.student_folder)
        )
        known = folder.read(Manifest).models.get(role)
        if known and known.fingerprint != model_fingerprint(path):
            raise _changed(folder, f"a model's files (the {part}'s)")

    def _scored(self, folder: RunFolder) -> Iterator[tuple[str, Path, int]]:
        if self.teacher_folder and self.recipe.eval.score_teacher:
            yield "teacher", self.teacher_folder, self.recipe.teacher.quantize_bits
        if self.recipe.eval.score_base:
            yield "base", self.student_folder, 0
        yield "student", folder.student, 0

    def _score(
        self, model: Model, task: Task, part: str, stops: frozenset[int], generations: Generations
    ) -> evaluate.Score:
        progress = self.view.count(f"scoring {part}", len(task.problems) * self.recipe.eval.samples)
        score = evaluate.score(
            model, self.tokenizer, task, self.recipe.eval, progress, stops, self.day, generations
        )
        self.view.say(f"{part}: {evaluate.describe(score)}")
        return score

    def _finish(self, folder: RunFolder) -> None:
        folder.update(Manifest, finished=True)
        report([folder.path], folder.path)
        self.view.say(f"report: {folder.path / 'report.html'}")


def _changed(folder: RunFolder, what: str) -> RunError:
    return RunError(
        f"{folder.path}: {what} changed since this run began; restore the old ones or start over "
        "with --fresh"
    )


def score_model(
    name: str,
    task_name: str,
    settings: tuple[str, ...],
    view: View,
    backend_name: str = "auto",
    out: Path | None = None,
) -> evaluate.Score:
    """Score a model, or the student of a run folder, on a task; `settings` are `field=value` of the
    `[eval]` table.

    Score and generations are kept in `out`, by default the folder `evals` of the run, or of the
    working folder.
    """
    path = Path(name)
    folder = path / "student" if (path / "recipe.toml").exists() else model_folder(name)
    if not folder.exists():
        raise NotFound(
            f"{path} holds a run without a finished student: run its recipe to the end first"
        )
    settings = eval_table(settings)
    task = load_task(task_name, settings.examples, settings.seed)
    tokenizer, backend = load_tokenizer(folder), choose_backend(backend_name)
    day = choose_day(
        DataTable(), tokenizer, [RunFolder(path).kept_day() if folder.parent == path else ""]
    )
    if day:
        view.say(about_day(day))
    model = backend.load_teacher(folder, name)
    for note in model.notes:
        view.say(f"note: {note}")
    progress = view.count(f"scoring {name}", len(task.problems) * settings.samples)
    made_by = identity(folder) | {"backend": backend.name}
    view.say(task.describe())
    with Evaluation.opened(
        out or (path if folder.parent == path else Path()) / "evals", name, task, settings, made_by
    ) as kept:
        generations = Generations(kept.generations, name, made_by, view.say)
        score = evaluate.score(
            model,
            tokenizer,
            task,
            settings,
            progress,
            stops_of(folder, tokenizer),
            day,
            generations,
        )
        kept.write(score.content(), generations.reference())
    view.say(f"{name} on {task.name}: {evaluate.describe(score)}")
    view.say(f"kept: {kept.generations} and {kept.result.name}")
    return score
