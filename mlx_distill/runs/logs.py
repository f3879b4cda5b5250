"""A log of one JSON object a line, each with its step: appended to, cut back, read whatever
happened to it.

In: rows, or a file that grew by them. Out: the rows that can be read, and which lines cannot.
Decided here: a line that cannot be read costs itself and no other; a last line without its end is
what a kill leaves, and is not worth a word.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from mlx_distill.errors import RunError
from mlx_distill.files import one_line, write_text
from mlx_distill.readers import parse_json
from mlx_distill.runs.digests import changed, digests
from mlx_distill.runs.rows import LOGS, Row

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass
class Lines(Generic[AnyRow]):
    """What a log holds: its rows, each with the text of its line, and the numbers of unreadable
    lines.
    """

    rows: list[AnyRow] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    torn_end: bool = False


def append(path: Path, row: Row) -> None:
    """Add a row. Raises `OSError`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.content()) + "\n")


def read(path: Path, kind: type[AnyRow]) -> Lines[AnyRow]:
    """The log's lines, none where there is no file; raises `RunError` where the file cannot be
    read.
    """
    found: Lines[AnyRow] = Lines()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return found
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({one_line(error)}); move it away") from None
    *lines, last = content.split(b"\n")
    for number, line in enumerate((*lines, last), start=1):
        row = _row(line, kind)
        if row is not None:
            found.rows.append(row)
            found.texts.append(line.decode())
        elif line.strip() and number <= len(lines):
            found.unreadable.append(number)
        else:
            found.torn_end = bool(line.strip())
    return found


def kept_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of both logs of a run, by their names."""
    return digests(folder, [kind.FILE for kind in LOGS if (folder / kind.FILE).is_file()])


def changes(folder: Path, kept: dict[str, str]) -> dict[str, str]:
    """Of each log that is not as it was `kept` what is wrong, as a sentence; {} where all are, or
    an older version kept nothing.
    """
    found = {
        kind.FILE: changed(folder, {kind.FILE: kept[kind.FILE]})
        for kind in LOGS
        if kind.FILE in kept
    }
    return {name: wrong for name, wrong in found.items() if wrong}


def _row(line: bytes, kind: type[AnyRow]) -> AnyRow | None:
    try:
        return kind.model_validate(parse_json(line, "", RunError))
    except (RunError, ValidationError):
        return None


def cut(path: Path, kind: type[AnyRow], step: int) -> Lines[AnyRow]:
    """Drop what was logged after `step`, and lines that cannot be read; returns what the log held
    before.

    Raises `OSError`.
    """
    found = read(path, kind)
    kept = [text for row, text in zip(found.rows, found.texts, strict=True) if row.step <= step]
    write_text(path, "".join(f"{text}\n" for text in kept))
    return found
