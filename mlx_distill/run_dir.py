"""One run = one folder, which at any moment can be killed and opened again.

    runs/NAME/  recipe.toml  manifest.json  metrics.jsonl  validation.jsonl  sample.json  eval.json
                checkpoints/step-000100/{weights,optimizer}.safetensors + state.json   student/   report.md   report.html

Decided here: what is written where, that every file but the two logs appears whole or not at all, which checkpoints stay,
and when an existing folder is continued or refused. The logs grow by lines and are cut back to the checkpoint on resume.
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mlx_distill.errors import DistillError, RecipeError, RunError
from mlx_distill.recipe import Recipe, load_recipe

STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class TrainState:
    """Where training stands after `step` optimizer steps. The position in the data is the step number itself."""

    step: int = 0
    tokens_seen: int = 0
    loss_tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    best_step: int = -1
    best_loss: float = float("inf")
    recipe_digest: str = ""


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Where the run of this recipe lies, whether it is there or not."""
        return cls(Path(recipe.run.folder).expanduser() / recipe.run.name)

    # opening

    @classmethod
    def open(cls, recipe: Recipe, fresh: bool = False) -> "RunFolder":
        """The folder of this recipe: made if new, continued if its recipe is equal, emptied first with `fresh`.

        Raises `RunError` if the folder holds another recipe's run (the differing fields are shown) or something else, and
        with `fresh` if another process works in it.
        """
        run = cls.of(recipe)
        if run.path.is_dir() and any(run.path.iterdir()):
            run._refuse_foreign()
            if fresh:
                run._remove()
            elif (run.path / "recipe.toml").exists():
                run._refuse_changed(recipe)
        run._make(recipe)
        return run

    def has_results(self) -> bool:
        """Whether there is anything that another recipe could not have made; a run that failed before its first step has nothing."""
        return bool(self.student.exists() or self.rows("validation.jsonl") or self.rows("metrics.jsonl") or self.steps())

    def _refuse_foreign(self) -> None:
        names = {entry.name for entry in self.path.iterdir()}
        begun = names & {"recipe.toml", "run.lock", ".recipe.toml.tmp"} or list(self.path.rglob("*")) == [self.checkpoints]
        if not (begun and self.checkpoints.is_dir()):
            raise RunError(f"{self.path} is not empty and holds no run: choose another --set run.name=NAME or move it away")

    def _remove(self) -> None:
        """The whole run goes by one rename, so that a kill leaves no half of it to be continued."""
        with self.locked(), _written(self.path):
            path = self.path.resolve()
            removed = path.with_name(f".{path.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)
            os.replace(path, removed)
            shutil.rmtree(removed)

    def _refuse_changed(self, recipe: Recipe) -> None:
        if not self.has_results():  # it failed before its first step: whatever it was meant to be, nothing is lost
            self._remove()
            return
        kept = self.recipe()
        if kept.digest() != recipe.digest():
            changes = "; ".join(kept.differences(recipe))
            raise RunError(
                f"{self.path} holds a run of another recipe ({changes}): give this one a name of its own "
                "(--set run.name=NAME) or start over with --fresh"
            )

    def _make(self, recipe: Recipe) -> None:
        kept, text = self.path / "recipe.toml", recipe.toml()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write the run folder {self.path}: {error.strerror}; choose another --set run.folder=…") from None
        if not kept.exists() or kept.read_text(encoding="utf-8") != text:  # fields outside of the digest may change
            self.write_text("recipe.toml", text)

    def recipe(self) -> Recipe:
        """The resolved recipe this run was started with."""
        try:
            return load_recipe(self.path / "recipe.toml")
        except RecipeError as error:
            raise RunError(f"{self.path} was started by another version of mlx-distill ({error}); use --fresh") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; a second one is refused."""
        with _written(self.path / "run.lock"):
            lock = (self.path / "run.lock").open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path} is in use by another mlx-distill process: wait for it or choose another run.name") from None
            yield

    def in_use(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            with (self.path / "run.lock").open("a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    # small files

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; raises `RunError` where it cannot be written."""
        temporary = self.path / f".{name}.tmp"
        with _written(self.path / name, temporary):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)

    def write_json(self, name: str, content: dict | list) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> dict:
        """The file's content, {} if there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def kept_day(self) -> str:
        """The day that this run's prompts say, "" before it has begun; older runs rendered them when they were made."""
        manifest = self.read_json("manifest.json")
        return manifest.get("prompt_date", manifest.get("created", "")[:10])

    # logs

    def append(self, log: str, row: dict) -> None:
        with _written(self.path / log), (self.path / log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, log: str) -> list[dict]:
        """The log's rows; a last line that a kill left incomplete is not one."""
        path = self.path / log
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_logs(self, step: int) -> None:
        """Drop what was logged after `step`."""
        for log in ("metrics.jsonl", "validation.jsonl"):
            kept = [row for row in self.rows(log) if row["step"] <= step]
            self.write_text(log, "".join(json.dumps(row) + "\n" for row in kept))

    # checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        found = (STEP_FOLDER.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def what_is_saved(self) -> str:
        """For an error's text."""
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was written yet"

    def last_state(self) -> TrainState:
        """The newest checkpoint's state, or the state before the first step."""
        steps = self.steps()
        if not steps:
            return TrainState()
        path = self.checkpoint(steps[-1]) / "state.json"
        try:
            return TrainState(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}): delete that checkpoint's folder, or start over with --fresh") from None

    def tidy(self, state: TrainState, keep: str) -> None:
        """Remove what a kill left behind: half-written checkpoints, and those that `keep` does not name."""
        for entry in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(entry)
        if state.step:
            self._prune(state, keep)

    def save_checkpoint(self, state: TrainState, write: Callable[[Path], None], keep: str) -> None:
        """A complete checkpoint appears by one rename; then those that `keep` does not name are removed.

        Raises `RunError` if it cannot be written; earlier checkpoints are then as they were.
        """
        final = self.checkpoint(state.step)
        if not final.exists():
            with _made_whole(final, lambda error: self._unsaved(state.step, error)) as temporary:
                write(temporary)
                (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
        self._prune(state, keep)

    def _unsaved(self, step: int, error: Exception) -> str:
        steps = self.steps()
        free = shutil.disk_usage(self.path).free / 1e9
        good = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        return (
            f"{self.checkpoint(step)}: the checkpoint could not be written ({error}; {free:.2f} GB free); {good}; "
            "free some disk and run the same command again"
        )

    def _prune(self, state: TrainState, keep: str) -> None:
        wanted = {"all": set(self.steps()), "last": {state.step}, "last_and_best": {state.step, state.best_step}}[keep]
        for step in set(self.steps()) - wanted:
            shutil.rmtree(self.checkpoint(step))

    # the exported student

    def write_student(self, write: Callable[[Path], None]) -> None:
        """The exported student, whole or not at all."""
        with _made_whole(self.student, self._unwritten) as temporary:
            write(temporary)

    def _unwritten(self, error: Exception) -> str:
        return (
            f"{self.student}: the student could not be written ({error}); the checkpoints are intact; "
            "free some disk and run the same command again"
        )


class SilentFolder(RunFolder):
    """The run's folder for a rank that is not the first: it reads what the first one wrote, and helps to make what is written."""

    @classmethod
    def open(cls, recipe: Recipe, fresh: bool = False) -> "SilentFolder":
        return cls.of(recipe)

    def locked(self) -> AbstractContextManager:
        return nullcontext()

    def write_text(self, name: str, text: str) -> None: ...

    def append(self, log: str, row: dict) -> None: ...

    def tidy(self, state: TrainState, keep: str) -> None: ...

    def save_checkpoint(self, state: TrainState, write: Callable[[Path | None], None], keep: str) -> None:
        write(None)

    def write_student(self, write: Callable[[Path | None], None]) -> None:
        write(None)


@contextmanager
def _made_whole(final: Path, explained: Callable[[Exception], str]) -> Iterator[Path]:
    """A new folder to write to, which appears as `final` by one rename, or not at all: then a `RunError` says why."""
    temporary = final.parent / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, final)
        flush_folder(final.parent)
    except DistillError:  # says itself what failed: a GPU's memory, a lost rank
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(explained(error)) from error


@contextmanager
def _written(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failure to write `path` into a `RunError`, and leave nothing half written at `temporary`."""
    try:
        yield
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); the checkpoints are intact; free some disk and run the same command again"
        ) from error


def flush_to_disk(folder: Path) -> None:
    """Wait until every file and folder of it lies on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            flush_folder(path)


def flush_folder(folder: Path) -> None:
    """The same for a folder's list of names, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
