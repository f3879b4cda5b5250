"""What a model wrote for each problem, kept as it is judged, so that a scoring that was stopped
goes on.

In: judged generations, a batch at a time. Out: a file of JSON lines, one a generation, and on the
next start the batches that are complete. Decided here: when a kept generation counts as one of this
scoring. Its `key` says so: a digest of the model's fingerprint and of all that the texts depend on
(prompts, expected answers, settings, backend, the verifier's version). Rows of the same model with
another key are replaced, and that is said; rows of other models in the file stay.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError, RunError
from mlx_distill.files import flush_file, locked, sha256_of, told_as, write_json, write_text
from mlx_distill.readers import parse_json
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.verify.tasks import Task

FILE = "generations.jsonl"


@dataclass(frozen=True)
class Generation:
    """One text that a model wrote, and its verdict.

    problem, sample: which one it answers. gold, compared: the expected answer, and how it was held
    against the text ("mathematics" or "text"). text: all that was written, reasoning included.
    finished: it has a stop token and `</think>`. well_formed: exactly one `</think>`. tokens: new
    ones, stop token included. seconds: its share of its batch's time.
    """

    problem: str
    sample: int
    prompt: str
    gold: str
    compared: str
    text: str
    correct: bool
    finished: bool
    well_formed: bool
    tokens: int
    seconds: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Generation | None":
        """The generation that a row says; None for a row that says none."""
        fields: dict[str, Any] = {name: row.get(name) for name in cls.__annotations__}
        for name, kind in cls.__annotations__.items():
            value = fields[name]
            if kind is float and type(value) is int:
                fields[name] = float(value)
            elif type(value) is not kind:
                return None
        return cls(**fields)


def first_texts(path: Path) -> dict[str, dict[str, Generation]]:
    """Model → problem → the first text that it wrote for it, as far as the file can be read."""
    found: dict[str, dict[str, Generation]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return found
    for line in filter(bytes.strip, lines):
        row, text = _parsed(line, path)
        if text and text.sample == 0 and isinstance(row.get("model"), str):
            found.setdefault(row["model"], {})[text.problem] = text
    return found


def _parsed(line: bytes, path: Path) -> tuple[dict[str, Any], Generation | None]:
    """A line's fields and the generation that they say; nothing of one that cannot be read."""
    try:
        row = parse_json(line, path.name)
    except DistillError:
        return {}, None
    return (row, Generation.of(row)) if isinstance(row, dict) else ({}, None)


class Generations:
    """One model's generations in a file; `fields` name the model and what it ran with, `say` tells
    a person.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        fields: dict[str, Any],
        say: Callable[[str], None] = lambda line: None,
    ):
        self.path, self.model, self.fields, self.say = path, model, fields, say
        self.key = ""
        self.kept: dict[tuple[str, int], Generation] = {}

    def begin(self, batches: list[list[tuple[str, int]]], **asked: Any) -> None:
        """Find what is kept of a scoring of these (problem, sample)s; what cannot be used is
        dropped from the file.
        """
        content = {"model": self.model, **self.fields, **asked, "batches": batches}
        self.key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        others, mine, older, unreadable = self._read()
        complete = [batch for batch in batches if all(one in mine for one in batch)]
        self.kept = {one: mine[one] for batch in complete for one in batch}
        if older:
            self.say(
                f"{self.path.name}: {older:,} generations of {self.model} were made with another "
                "model, task or settings and are replaced"
            )
        if unreadable:
            self.say(f"{self.path.name}: {unreadable} unreadable or torn lines are dropped")
        if older or unreadable or len(mine) > len(self.kept):
            with told_as(RunError, self.path):
                write_text(self.path, "".join(others + list(map(self._line, self.kept.values()))))
        if self.kept:
            total = sum(map(len, batches))
            self.say(
                f"scoring {self.model} goes on: {len(self.kept):,} of {total:,} generations are "
                "kept"
            )

    def add(self, rows: Iterable[Generation]) -> None:
        """Keep a batch; it is on the disk when this returns."""
        rows = list(rows)
        with told_as(RunError, self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(self._line, rows)))
            file.flush()
            flush_file(file)
        self.kept |= {(row.problem, row.sample): row for row in rows}

    def reference(self) -> dict[str, Any]:
        """What a score says of the file that it was made from."""
        return {"file": self.path.name, "sha256": sha256_of(self.path)}

    def _line(self, row: Generation) -> str:
        return json.dumps({"model": self.model, "key": self.key, **asdict(row)}) + "\n"

    def _read(self) -> tuple[list[str], dict[tuple[str, int], Generation], int, int]:
        """Lines of other models, generations of this scoring, how many of an older one, how many
        unreadable lines.
        """
        others, mine, older, unreadable = [], {}, 0, 0
        with told_as(RunError, self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = content.split(b"\n")  # what has no end of line was being written
        for line in filter(bytes.strip, lines):
            row, found = _parsed(line, self.path)
            if found is None:
                unreadable += 1
            elif row.get("model") != self.model:
                others.append(line.decode() + "\n")
            elif row.get("key") != self.key:
                older += 1
            else:
                mine[found.problem, found.sample] = found
        return others, mine, older, unreadable + bool(torn)


@dataclass(frozen=True)
class Evaluation:
    """The two files that `mlx-distill eval` writes: generations as they come, and the score at the
    end.
    """

    generations: Path
    result: Path
    told: dict[str, Any]

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, model: str, task: Task, settings: EvalTable, made_by: dict[str, Any]
    ) -> Iterator["Evaluation"]:
        """The files of this model, task and settings, held for this process; a second one is
        refused.

        Their name says model and task, and a digest of what else the texts depend on, so that
        another evaluation has files of its own.
        """
        told = {
            "model": model,
            "task": task.name,
            "settings": settings.model_dump(),
            "made_by": made_by,
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        name = "-".join(filter(None, (_as_name(model), _as_name(task.name), digest)))
        with told_as(RunError, folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f".{name}.lock"):
                told |= {
                    "compared": task.compared(),
                    "prompt": task.prompt,
                    "answer": task.answer,
                    "problems": task.digest,
                }
                yield cls(folder / f"{name}.jsonl", folder / f"{name}.json", told)

    def write(self, score: dict[str, Any], generations: dict[str, Any]) -> None:
        """Keep the score beside the generations that it was made from."""
        with told_as(RunError, self.result):
            write_json(self.result, self.told | {"generations": generations, "score": score})


def _as_name(text: str) -> str:
    """The last part of a path or a hub id, in characters that every disk takes."""
    stem = re.sub(r"\.(?:jsonl|gguf)(?:\.gz)?$", "", text.rstrip("/"), flags=re.I)
    return re.sub(r"[^A-Za-z0-9.]+", "-", stem.rpartition("/")[2]).strip("-.")[:60]
