"""The exported student of a run: a model folder that appears whole, and is known by its digests.

In: a function that writes a model folder. Out: that folder as `student`, and in the run's manifest
the SHA-256 of each of its files. Decided here: which files in it are the run's own, and when the
student counts as written by this run.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_distill.backends.failures import explained
from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import first_line, left_overs, made_whole, remedy
from mlx_distill.runs import own_files
from mlx_distill.runs.checkpoints import UNWRITTEN
from mlx_distill.runs.digests import all_files, changed, digests
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.small_files import INTACT, SmallFiles


class ExportedStudent:
    """The folder `path` of a run whose manifest is among `files`."""

    def __init__(self, path: Path, files: SmallFiles):
        self.path, self.files = path, files

    def is_complete(self, has_checkpoints: bool) -> bool:
        """Whether it is there, and the manifest says that this run wrote it; raises `RunError`
        where it does not.
        """
        if not (self.path / "config.json").is_file():
            return False
        way = (
            f"put a copy in its place, or delete {self.path}: the newest checkpoint writes both "
            "again"
        )
        try:
            manifest = self.files.read(Manifest)
        except RunError as error:
            raise RunError(f"{error}; {way}") from None
        if manifest.exported_step is not None:
            return True
        if has_checkpoints:
            raise RunError(
                f"{self.files.path / Manifest.FILE} does not say which step {self.path} is of: {way}"
            )
        raise RunError(f"{self.path} holds a model that no run wrote: move it away")

    def write(self, write: Callable[[Path], None]) -> None:
        """Whole or not at all, in the place of an incomplete one. Raises `RunError`."""
        try:
            own_files.remove(self.path, self.own())
            with explained("the student's export"), made_whole(self.path) as half:
                write(half)
                self.files.update(Manifest, student_files=digests(half, all_files(half)))
        except DistillError:
            raise
        except UNWRITTEN as error:
            raise RunError(
                f"{self.path}: the student could not be written ({first_line(error)}); {INTACT}; "
                f"{remedy(error)}"
            ) from error

    def damage(self) -> str:
        """Which file is not as this run wrote it, as a sentence; "" if none. Older versions kept no
        digests.
        """
        return changed(self.path, self.files.read(Manifest).student_files or {})

    def refuse_changed(self) -> None:
        """Raises `RunError` if a file is not as this run wrote it."""
        if wrong := self.damage():
            raise RunError(f"{wrong}; {self.remedy}")

    @property
    def remedy(self) -> str:
        """What brings back a student that is not as this run wrote it."""
        return (
            f"put a copy in its place, or delete {self.path} and `mlx-distill run` its recipe "
            "again: the newest checkpoint writes it"
        )

    def own(self) -> own_files.Own:
        """Which files in it are the run's own."""
        manifest = self.files.readable(Manifest)
        kept = manifest.student_files
        named = own_files.is_student_file if kept is None else kept.__contains__
        card = manifest.card or self._card_of_earlier_run()
        return lambda name: named(name) or (name == own_files.CARD and self._card_is(card))

    def _card_of_earlier_run(self) -> str:
        """The digest of the card of a run that is being removed, whose manifest is gone."""
        mark = self.files.path / own_files.STARTING_OVER
        return mark.read_text(encoding="utf-8") if mark.is_file() else ""

    def _card_is(self, digest: str) -> bool:
        """Whether the model card is as a run wrote it."""
        return bool(digest) and not changed(self.path, {own_files.CARD: digest})

    def remove_left_overs(self) -> None:
        """What a kill left half exported."""
        for path in left_overs(self.path.parent, re.compile("student")):
            shutil.rmtree(path, ignore_errors=True)

    def foreign(self) -> list[Path]:
        """What in it, or in its place, no run made."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            return [self.path]
        return own_files.foreign(self.path, self.own())

    def refuse_foreign(self) -> None:
        """Raises `RunError` if something lies where a student is still to be written."""
        if not (self.path / "config.json").is_file() and (found := self.foreign()):
            names = own_files.few(found, self.files.path)
            raise RunError(
                f"{self.files.path}: the student will be written where {names} lies: move that away"
            )
