"""A run's `eval.json`: the task, and what teacher, base and student scored on it."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator

from mlx_distill.runs.digests import changed
from mlx_distill.runs.own_files import SCORES
from mlx_distill.runs.record import Count, Record
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.generations import FILE
from mlx_distill.scoring.score import Score


class GenerationsFile(Record):
    """The file that scores were made from, as it was when the last of them was."""

    file: str
    sha256: str


class TaskScores(Record):
    """compared: how many problems were compared as mathematics, and how many as text. prompt: how a
    problem was put. answer: where the answer was looked for. problems: their
    digest, "" of an older version. scores: by
    model ("teacher", "base", "student"); None where what is kept of one is no whole score.
    """

    FILE: ClassVar[str] = SCORES
    SEALED: ClassVar[bool] = True

    task: str = ""
    compared: dict[str, Count] = Field(default_factory=dict)
    prompt: str = ""
    answer: str = ""
    problems: str = ""
    generations: GenerationsFile | None = None
    scores: dict[str, Score | None] = Field(default_factory=dict)

    @field_validator("scores", mode="before")
    @classmethod
    def _one_by_one(cls, content: Any) -> Any:
        """A broken score costs itself and no other."""
        if not isinstance(content, dict):
            return content
        return {model: _score(fields) for model, fields in content.items()}

    @property
    def whole(self) -> dict[str, Score]:
        """The scores that can be read."""
        return {model: score for model, score in self.scores.items() if score}

    @property
    def broken(self) -> list[str]:
        """The models whose score cannot be read."""
        return [model for model, score in self.scores.items() if not score]


def changed_generations(folder: Path, scored: TaskScores) -> str:
    """What is wrong with the file that the scores of a finished run were made from, as a sentence;
    "" if nothing is.
    """
    return changed(folder, {FILE: scored.generations.sha256}) if scored.generations else ""


def forget_score(folder: RunFolder, model: str) -> None:
    """Before a model is written again: a score of an earlier one is not a score of it."""
    kept = folder.readable(TaskScores)
    if model in kept.scores:
        rest = {name: score for name, score in kept.scores.items() if name != model}
        folder.write(kept.model_copy(update={"scores": rest}))


def _score(fields: Any) -> Score | None:
    if isinstance(fields, Score):
        return fields
    try:
        return Score.model_validate(fields)
    except ValidationError:
        return None
