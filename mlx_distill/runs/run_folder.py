"""One run = one folder, which at any moment can be killed and opened again.

    runs/NAME/  recipe.toml  manifest.json  metrics.jsonl  validation.jsonl  sample.json  eval.json
    generations.jsonl
                checkpoints/step-000100/   student/   report.md  report.html   run.lock   evals/ (of
                `eval`)

Decided here: what is written where, that every file but the logs appears whole or not at all, and
when a folder is continued, started over or refused. The run's own files have names
(`runs/own_files.py`); nothing else is ever removed or overwritten. The logs grow by lines; those of
training are cut back to the checkpoint on resume, generations to the last whole batch
(`scoring/generations.py`).
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from mlx_distill import files
from mlx_distill.backends.failures import explained
from mlx_distill.data.day import kept_as_day, shared_day
from mlx_distill.errors import DistillError, NotFound, RecipeError, RunError
from mlx_distill.files import (
    InUse,
    flush_folder,
    of_people,
    one_line,
    remedy,
    told_as,
    write_text,
)
from mlx_distill.readers import read_text
from mlx_distill.recipe.load import load_kept_recipe
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.runs import own_files
from mlx_distill.runs.checkpoints import UNWRITTEN, Checkpoints, TrainState
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.ownership import refuse_other_folder
from mlx_distill.runs.record import Record
from mlx_distill.runs.rows import LOGS, Row
from mlx_distill.runs.small_files import INTACT, Say, SmallFiles, quiet
from mlx_distill.runs.students import ExportedStudent

__all__ = ["RunFolder", "SilentFolder", "TrainState"]


class RunFolder(SmallFiles):
    """Reads and writes one run's files."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"
        self.saved = Checkpoints(self.checkpoints)
        self.exported = ExportedStudent(self.student, self)

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Where the run of this recipe lies, whether it is there or not."""
        return cls(Path(recipe.run.folder).expanduser() / recipe.run.name)

    # opening

    @classmethod
    def open(cls, recipe: Recipe, fresh: bool = False, say: Say = quiet) -> Self:
        """As `held`, and let go of at once."""
        with cls.held(recipe, fresh, say) as run:
            return run

    @classmethod
    @contextmanager
    def held(cls, recipe: Recipe, fresh: bool = False, say: Say = quiet) -> Iterator[Self]:
        """The folder of this recipe, held for this process: made if new, continued if its recipe is
        equal.

        With `fresh` the run's own files are removed first. Raises `RunError` if another process
        holds it, or if it holds another recipe's run (the differing fields are shown) or something
        else.
        """
        run = cls.of(recipe)
        refuse_other_folder(run.path)
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{one_line(error)}; choose another --set run.folder=…"
            raise RunError(f"cannot write the run folder {run.path}: {why}") from None
        with run.locked():
            run._begin(recipe, fresh, say)
            yield run

    def _begin(self, recipe: Recipe, fresh: bool, say: Say) -> None:
        if fresh or (self.path / own_files.STARTING_OVER).exists():
            self._start_over(say)
        elif self.has_results():
            self._refuse_changed(recipe, say)
        else:  # it failed before its first step: whatever it was meant to be, nothing is lost
            self._remove_own()
        self.exported.refuse_foreign()
        self._remove_left_aside()
        text = recipe.toml()
        try:
            kept = read_text(self.path / "recipe.toml", error=RunError)
        except DistillError:
            kept = ""
        if kept != text:  # fields outside of the digest may change
            self.write_text("recipe.toml", text)

    def has_results(self) -> bool:
        """Whether there is anything that another recipe could not have made."""
        if (self.path / own_files.STARTING_OVER).exists():
            return False
        return bool(
            (self.student / "config.json").exists()
            or any((self.path / name).exists() for name in ("eval.json", "generations.jsonl"))
            or self.saved.steps()
            or any(self.rows(kind) for kind in LOGS)
        )

    def _refuse_changed(self, recipe: Recipe, say: Say) -> None:
        try:
            kept = self.recipe()
        except RunError:
            if self._known_digest() != recipe.digest():
                raise
            say(
                f"note: {self.path / 'recipe.toml'} cannot be read; by its digest this is the "
                "run's recipe, written again"
            )
            return
        if kept.digest() == recipe.digest():
            return
        changes = "; ".join(kept.differences(recipe))
        asked_alike = with_values(kept, eval=dict(recipe.eval))
        if asked_alike.digest() == recipe.digest() and self.has_student():
            self._ask_anew(recipe, f"{self.path} is scored as asked now: {changes}", say)
            return
        raise RunError(
            f"{self.path} holds a run of another recipe ({changes}): give this one a name of "
            "its own (--set run.name=NAME) or start over with --fresh"
        )

    def _ask_anew(self, recipe: Recipe, why: str, say: Say) -> None:
        """How a finished student is scored may change: scores of earlier settings go, before the
        recipe says other ones.
        """
        with told_as(RunError, self.path / own_files.SCORES, INTACT):
            (self.path / own_files.SCORES).unlink(missing_ok=True)
            flush_folder(self.path)
        self.update(Manifest, recipe_digest=recipe.digest(), finished=False)
        say(why)

    def _known_digest(self) -> str:
        """The recipe's digest as manifest or checkpoints know it, "" if neither does."""
        try:
            return self.readable(Manifest).recipe_digest or self.last_state().recipe_digest
        except RunError:
            return ""

    def recipe(self) -> Recipe:
        """The resolved recipe this run was started with."""
        path = self.path / "recipe.toml"
        try:
            return load_kept_recipe(path)
        except NotFound:
            raise RunError(
                f"{path} is missing: put a copy in its place, or start over with --fresh"
            ) from None
        except RecipeError as error:
            raise RunError(
                f"{self.path} was started by another version of mlx-distill or its recipe.toml is "
                f"damaged ({error}): put back a copy; use --fresh to start over"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; a second one is refused."""
        lock = self.path / own_files.LOCK
        with ExitStack() as stack:
            try:
                with told_as(RunError, lock, INTACT):
                    stack.enter_context(files.locked(lock))
            except InUse:
                raise RunError(
                    f"{self.path} is in use by another mlx-distill process: wait for it or choose "
                    "another run.name"
                ) from None
            yield

    def in_use(self) -> bool:
        """Whether a process holds the folder now."""
        return files.is_locked(self.path / own_files.LOCK)

    def kept_day(self) -> str:
        """The day that this run's prompts say, or will say as a run of a sweep; "" where none is
        chosen yet.
        """
        where = f"prompt_date in {self.path / Manifest.FILE}"
        return kept_as_day(self.readable(Manifest).day, where) or shared_day(self.path.parent)

    # starting over

    def _start_over(self, say: Say) -> None:
        """Remove the earlier run. A mark stands meanwhile, so that the next start goes on after a
        kill.
        """
        inside = [*self.saved.foreign_after(0), *self.exported.foreign()]
        if inside:
            raise RunError(
                f"{self.path} cannot start over: no run made {own_files.few(inside, self.path)}: "
                "move that away"
            )
        mark = self.path / own_files.STARTING_OVER
        with told_as(RunError, mark):
            if not mark.exists():  # what the manifest knows of the card outlives the manifest
                write_text(mark, self.readable(Manifest).card)
                flush_folder(self.path)
        self._remove_own()
        with told_as(RunError, mark):
            mark.unlink()
        known = ("checkpoints", own_files.LOCK)
        kept = [entry for entry in of_people(self.path) if entry.name not in known]
        kept += of_people(self.checkpoints)
        if kept:
            say(f"note: {self.path} keeps {own_files.few(kept, self.path)}, which no run made")

    def _remove_own(self) -> None:
        """Every file that a run made, in an order in which no part of them looks finished."""
        with told_as(RunError, self.path):
            own_student = self.exported.own()
            own_files.remove_named(self.path, own_files.is_own_file)
            self.saved.remove_all()
            self.exported.remove_left_overs()
            if (self.path / own_files.STARTING_OVER).exists():
                own_files.remove(self.student, own_student)
            flush_folder(self.path)

    def _remove_left_aside(self) -> None:
        """What a killed --fresh of an older version left beside the folder."""
        path = self.path.resolve()
        removed = RunFolder(path.with_name(f".{path.name}.removed"))
        if removed.path.is_dir() and not removed.path.is_symlink():
            with told_as(RunError, removed.path):
                own_files.remove(removed.student, removed.exported.own())
                removed.saved.remove_all()
                own_files.remove(
                    removed.path, lambda name: own_files.is_own_file(name) or name == own_files.LOCK
                )

    # checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.saved.path(step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return self.saved.steps()

    def what_is_saved(self) -> str:
        """For an error's text."""
        return self.saved.what_is_saved() or "no checkpoint was written yet"

    def last_state(self, needs_best: bool = False, say: Say = quiet) -> TrainState:
        """The newest whole checkpoint's state, or the state before the first step; see
        `Checkpoints.newest`.
        """
        return self.saved.newest(needs_best, say)

    def state_at(self, step: int) -> TrainState:
        """The state of a step that `last_state` chose."""
        return self.saved.state(step) if step else TrainState()

    def tidy(self, state: TrainState, keep: str) -> None:
        """Remove what a kill left behind: half-written checkpoints, and those that `keep` does not
        name.
        """
        inside = self.saved.foreign_after(state.step)
        if inside:
            names = own_files.few(inside, self.path)
            raise RunError(
                f"{self.path} needs the place of {names}, which no run made: move that away"
            )
        with told_as(RunError, self.checkpoints, INTACT):
            self.saved.tidy()
            if state.step:
                self.saved.prune(state, keep)

    def save_checkpoint(
        self, state: TrainState, write: Callable[[Path | None], None], keep: str
    ) -> None:
        """A complete checkpoint appears by one rename; then those that `keep` does not name are
        removed.

        Raises `RunError` if it cannot be written; earlier checkpoints are then as they were.
        """
        try:
            with explained("a checkpoint"):
                self.saved.save(state, write)
        except DistillError:  # says itself what failed: a GPU's memory, a lost rank
            raise
        except UNWRITTEN as error:
            good = self.saved.what_is_saved() or "there is no earlier checkpoint"
            raise RunError(
                f"{self.checkpoint(state.step)}: the checkpoint could not be written "
                f"({files.first_line(error)}; {shutil.disk_usage(self.path).free / 1e9:.2f} GB "
                f"free); {good}; {remedy(error)}"
            ) from error
        with told_as(RunError, self.checkpoints, INTACT):
            self.saved.prune(state, keep)

    # the exported student

    def has_student(self) -> bool:
        """Whether training is complete."""
        return self.exported.is_complete(bool(self.steps()))

    def write_student(self, write: Callable[[Path | None], None]) -> None:
        """The exported student, whole or not at all."""
        self.exported.write(write)


class SilentFolder(RunFolder):
    """The run's folder for a rank that is not the first: it reads what the first one wrote, and
    helps to make what is written.
    """

    @classmethod
    @contextmanager
    def held(cls, recipe: Recipe, fresh: bool = False, say: Say = quiet) -> Iterator[Self]:
        yield cls.of(recipe)

    def write_text(self, name: str, text: str) -> None: ...

    def write(self, record: Record) -> None: ...

    def append(self, row: Row) -> None: ...

    def cut_logs(self, step: int, say: Say = quiet) -> None: ...

    def last_state(self, needs_best: bool = False, say: Say = quiet) -> TrainState:
        """Nothing: the first rank looks, see `Training`."""
        return TrainState()

    def tidy(self, state: TrainState, keep: str) -> None: ...

    def save_checkpoint(
        self, state: TrainState, write: Callable[[Path | None], None], keep: str
    ) -> None:
        write(None)

    def write_student(self, write: Callable[[Path | None], None]) -> None:
        write(None)
