"""The small files of a run: JSON and text, which appear whole or not at all, and the logs.

In: a folder. Out: what its files hold. Decided here: a file that is not there is empty; one that
cannot be read is told in one line, and whoever asks says whether that ends the run or what is done
instead.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill import files
from mlx_distill.errors import NotFound, RunError
from mlx_distill.files import told_as
from mlx_distill.readers import read_json
from mlx_distill.runs import logs, manifests
from mlx_distill.runs.seals import SEALED, is_broken, sealed, unsealed

LOGS = ("metrics.jsonl", "validation.jsonl")
INTACT = "the checkpoints are intact"
Say = Callable[[str], None]


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

    def write_json(self, name: str, content: dict | list) -> None:
        content = sealed(content) if name in SEALED else content
        with told_as(RunError, self.path / name, INTACT):
            files.write_json(self.path / name, content)

    def read_json(self, name: str) -> dict[str, Any]:
        """The file's content, {} if there is none; raises `RunError` where it cannot be read."""
        try:
            content = read_json(self.path / name, error=RunError)
        except NotFound:
            if (self.path / name).is_dir():
                raise RunError(f"{self.path / name} is a folder: move it away") from None
            return {}
        wrong = manifests.trouble(content) if name == "manifest.json" else ""
        if wrong or not isinstance(content, dict):
            raise RunError(f"{self.path / name} is damaged: {wrong or 'it holds no object'}")
        if name in SEALED and is_broken(content):
            raise RunError(f"{self.path / name} is damaged: it is not as the run wrote it")
        return unsealed(content) if name in SEALED else content

    def readable(self, name: str, say: Say = quiet, otherwise: str = "") -> dict[str, Any]:
        """The same, but a file that cannot be read is told, with what is done instead, and {}."""
        try:
            return self.read_json(name)
        except RunError as error:
            say(f"note: {error}; {otherwise}")
            return {}

    # logs

    def append(self, log: str, row: dict) -> None:
        with told_as(RunError, self.path / log, INTACT):
            logs.append(self.path / log, row)

    def rows(self, log: str) -> list[dict]:
        """The log's rows, as far as they can be read."""
        return logs.read(self.path / log).rows

    def cut_logs(self, step: int, say: Say = quiet) -> None:
        """Drop what was logged after `step`; say which lines cannot be read, and whether rows are
        missing.
        """
        for log in LOGS:
            with told_as(RunError, self.path / log, INTACT):
                found = logs.cut(self.path / log, step)
            if found.unreadable:
                lines = ", ".join(map(str, found.unreadable[:5]))
                say(
                    f"note: {self.path / log}: line {lines} cannot be read and is left out; the "
                    "other rows are kept"
                )
            have = {row["step"] for row in found.rows}
            expected = (
                set(range(1, step + 1)) if log == "metrics.jsonl" else {0} if step >= 0 else set()
            )
            missing = expected - have
            if missing and not found.unreadable:
                say(
                    f"note: {self.path / log} lacks {len(missing)} of {len(expected)} rows; the "
                    "checkpoint has the totals"
                )
