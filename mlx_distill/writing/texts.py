"""Texts that a model wrote, in a file of lines that can be killed and read again at any moment.

In: texts, a batch at a time. Out: the batches that are complete. Decided here: when a kept text
counts. A line holds a digest of its own content, so that a torn or damaged one is seen, dropped
with a note and written again; and a batch counts when all of it is there, because texts that are
written together can move each other's last digits.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import flush_file, told_as, write_text
from mlx_distill.readers import parse_json
from mlx_distill.runs.manifest import Written
from mlx_distill.runs.record import Count, Number, Record
from mlx_distill.words import amount, counted, duration, percent

Say = Callable[[str], None]


class Asked(NamedTuple):
    """One text to be written: the example whose prompt is asked, and which answer to it."""

    example: str
    sample: int


class Text(Record):
    """What a model wrote: new token ids, the stop id included where one came.

    step: how many training steps its writer had done. right: whether it states the example's
    answer; None where the example has none. seconds: its share of its batch's time.
    """

    example: str
    sample: Count
    step: Count
    tokens: list[Count]
    finished: bool
    right: bool | None
    seconds: Number

    @property
    def asked(self) -> Asked:
        return Asked(self.example, self.sample)

    def line(self) -> str:
        content = self.content()
        return json.dumps(content | {"digest": _digest(content)}) + "\n"

    @classmethod
    def of_line(cls, line: bytes) -> "Text | None":
        """The text of a line; None for a line that was torn or changed."""
        try:
            row = parse_json(line, "a text")
            if row.pop("digest") != _digest(row):
                return None
            return cls.model_validate(row)
        except (DistillError, ValidationError, AttributeError, KeyError, TypeError):
            return None


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class TextFile:
    """The texts in one file; its user sees to it that no other process writes it."""

    def __init__(self, path: Path, say: Say):
        self.path, self.say = path, say

    def read(self, batches: Sequence[Sequence[Asked]], step: int = 0) -> list[Text]:
        """The kept texts of the batches that are complete, in the order asked; a torn or damaged
        line is removed.
        """
        texts, damaged = self._lines()
        if damaged:
            self.say(f"{self.path}: {damaged} torn or damaged lines are dropped and written again")
            with told_as(RunError, self.path):
                write_text(self.path, "".join(text.line() for text in texts))
        found = {text.asked: text for text in texts if text.step == step}
        complete = [batch for batch in batches if all(asked in found for asked in batch)]
        return [found[asked] for batch in complete for asked in batch]

    def everything(self) -> list[Text]:
        """All texts, of all steps."""
        return self._lines()[0]

    def add(self, texts: Iterable[Text]) -> None:
        """Keep a batch; it is on the disk when this returns."""
        with told_as(RunError, self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(text.line() for text in texts))
            file.flush()
            flush_file(file)

    def _lines(self) -> tuple[list[Text], int]:
        """The texts, and how many lines say none."""
        with told_as(RunError, self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = content.split(b"\n")  # what has no end of line was being written
        texts = [Text.of_line(line) for line in lines]
        return [text for text in texts if text], texts.count(None) + bool(torn)


def account(texts: Sequence[Text], by: str) -> Written:
    """What was written, for a run's manifest."""
    return Written(
        by=by,
        texts=len(texts),
        finished=sum(text.finished for text in texts),
        judged=sum(text.right is not None for text in texts),
        right=sum(text.right is True for text in texts),
        tokens=sum(len(text.tokens) for text in texts),
        seconds=sum(text.seconds for text in texts),
    )


def describe(found: Written) -> str:
    """One line: how many texts, what became of them, what they cost."""
    parts = [counted(found.texts, "text"), f"{amount(found.tokens)} tokens"]
    if found.texts:
        parts.append(f"{percent(found.finished / found.texts)} finished")
    if found.judged:
        of = f" of {found.judged:,} to prompts whose answer is known"
        said = "" if found.judged == found.texts else of
        parts.append(f"{percent(found.right / found.judged)} right{said}")
    return ", ".join([*parts, duration(found.seconds)])
