"""The small files of a run: records and text, which appear whole or not at all, and the logs.

In: a folder. Out: what its files hold, as records. Decided here: a file that is not there is empty;
one that cannot be read is told in one line, and whoever asks says whether that ends the run or what
is done instead.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_distill import files
from mlx_distill.errors import NotFound, RunError
from mlx_distill.files import told_as
from mlx_distill.readers import read_json
from mlx_distill.runs import logs
from mlx_distill.runs.record import Record, damage
from mlx_distill.runs.rows import LOGS, Row
from mlx_distill.runs.seals import BrokenSeal, sealed, unsealed

INTACT = "the checkpoints are intact"
Say = Callable[[str], None]
R = TypeVar("R", bound=Record)
AnyRow = TypeVar("AnyRow", bound=Row)


def quiet(_: str) -> None:
    """For who does not want to hear notes."""


class SmallFiles:
    """Reads and writes the files of a folder."""

    def __init__(self, path: Path):
        self.path = path

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; raises `RunError` where it cannot be written."""
        with told_as(RunError, self.path / name, INTACT):
            files.write_text(self.path / name, text)

    def write(self, record: Record) -> None:
        content: Any = record.content()
        with told_as(RunError, self.path / record.FILE, INTACT):
            files.write_json(self.path / record.FILE, sealed(content) if record.SEALED else content)

    def update(self, kind: type[Record], **fields: Any) -> None:
        """Write the record of a kind again, with other values for some of its fields."""
        self.write(self.read(kind).model_copy(update=fields))

    def read(self, kind: type[R]) -> R:
        """What the file of a kind holds, the defaults if there is none; raises `RunError` where it
        cannot be read.
        """
        path = self.path / kind.FILE
        try:
            content = read_json(path, error=RunError)
        except NotFound:
            if path.is_dir():
                raise RunError(f"{path} is a folder: move it away") from None
            return kind()
        try:
            if kind.SEALED and isinstance(content, dict):
                content = unsealed(content)
            return kind.model_validate(content)
        except ValidationError as error:
            raise RunError(f"{path} is damaged: {damage(error)}") from None
        except BrokenSeal:
            raise RunError(f"{path} is damaged: it is not as the run wrote it") from None

    def readable(self, kind: type[R], say: Say = quiet, otherwise: str = "") -> R:
        """The same, but a file that cannot be read is told, with what is done instead, and counts
        as none.
        """
        try:
            return self.read(kind)
        except RunError as error:
            say(f"note: {error}; {otherwise}")
            return kind()

    # logs

    def append(self, row: Row) -> None:
        with told_as(RunError, self.path / row.FILE, INTACT):
            logs.append(self.path / row.FILE, row)

    def rows(self, kind: type[AnyRow]) -> list[AnyRow]:
        """The rows of a log, as far as they can be read."""
        return logs.read(self.path / kind.FILE, kind).rows

    def cut_logs(self, step: int, say: Say = quiet) -> None:
        """Drop what was logged after `step`; say which lines cannot be read, and whether rows are
        missing.
        """
        for kind in LOGS:
            path = self.path / kind.FILE
            with told_as(RunError, path, INTACT):
                found = logs.cut(path, kind, step)
            if found.unreadable:
                lines = ", ".join(map(str, found.unreadable[:5]))
                say(
                    f"note: {path}: line {lines} cannot be read and is left out; the other rows "
                    "are kept"
                )
            expected = kind.expected(step)
            missing = expected - {row.step for row in found.rows}
            if missing and not found.unreadable:
                say(
                    f"note: {path} lacks {len(missing)} of {len(expected)} rows; the checkpoint "
                    "has the totals"
                )
