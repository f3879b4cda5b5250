"""Two scores beside each other: `mlx-distill compare A B`.

In: two names, each a run folder or a file that `mlx-distill eval` kept, and their scores. Out: one
line, and a page. Decided here: that scores of different tasks, prompts or rules about where the
answer stands are not compared.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_distill.errors import DataError, DistillError, NotFound
from mlx_distill.readers import read_json
from mlx_distill.recipe.load import load_kept_recipe
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.reporting.page import Note, Page, Report, Section, write
from mlx_distill.reporting.table import Cell, Table
from mlx_distill.runs.named import run_at
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.also import further_scores
from mlx_distill.scoring.score import Difference, Score, compare
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.words import percent

NOTES = (
    "The difference is paired: each problem's share of right answers of the one less that of the "
    "other. Its 95 % interval (Bonett and Price 2012) covers the choice of problems and the sampling "
    "of answers, not another training seed.",
    "An interval that contains zero leaves open which one is better.",
)
# settings that decide what is right, and in which two scores may differ all the same
TOLD = ("max_new_tokens", "temperature", "top_p", "samples")


@dataclass(frozen=True)
class Scored:
    """A score under its name, and how it was asked: task, prompt, where the answer stood. settings:
    of `[eval]`, as far as they are known. also: the same of further tasks, by task.
    """

    name: str
    score: Score
    asked: tuple[str, str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    also: dict[str, "Scored"] = field(default_factory=dict)


def scored_by(name: str) -> Scored:
    """The scores that a run keeps of its student, or a result file of `mlx-distill eval`. Raises
    `NotFound` where there is none, `DataError` for a file that holds none.
    """
    run = run_at(name)
    if run:
        kept = run.readable(TaskScores)
        if "student" not in kept.whole:
            raise NotFound(f"{name}: this run has no score; `mlx-distill eval {name}` makes one")
        asked = kept.task, kept.prompt, kept.answer
        settings = _settings(run)
        return Scored(
            name,
            kept.whole["student"],
            asked,
            settings.model_dump() if settings else {},
            _further(name, run, settings) if settings else {},
        )
    path = Path(name).expanduser()
    if path.suffix != ".json" or not path.is_file():
        raise NotFound(
            f"{name} is no run folder and no .json that `mlx-distill eval` kept: score a model with "
            "--task TASK"
        )
    content = read_json(path, name)
    try:
        asked = content["task"], content.get("prompt", ""), content.get("answer", "")
        score = Score.model_validate_json(json.dumps(content["score"]))
        return Scored(name, score, asked, dict(content.get("settings", {})))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{name} holds no score of `mlx-distill eval`; name another file") from None


def _settings(run: RunFolder) -> EvalTable | None:
    """How a run was scored; None where its recipe cannot be read."""
    try:
        return load_kept_recipe(run.path / "recipe.toml").eval
    except DistillError:
        return None


def _further(name: str, run: RunFolder, settings: EvalTable) -> dict[str, Scored]:
    """A run's student on its further tasks."""
    return {
        one.task: Scored(
            name,
            one.scores["student"],
            (one.task, one.prompt, one.answer),
            settings.model_dump(),
        )
        for one in further_scores(run.path, settings)
        if "student" in one.scores
    }


def compared(a: Scored, b: Scored, out: Path) -> tuple[list[str], Report]:
    """The verdict in a line for each task that both were given, and the page. Raises `DataError`
    where the two were asked otherwise or share no problem, `RunError` where nothing can be written.
    """
    pairs, lines = _pairs(a, b), []
    for ours, theirs in pairs:
        _refuse_asked_otherwise(ours, theirs)
        on = f" on {ours.asked[0]}" if len(pairs) > 1 or ours is not a else ""
        lines.append(verdict(ours, theirs, compare(ours.score, theirs.score), on))
    page = _page(pairs, lines)
    if told := _asked_otherwise(a, b):
        lines = [*lines, f"note: {told}"]
        page = replace(page, leads=[*page.leads, f"{told}."])
    return lines, write(page, out)


def _pairs(a: Scored, b: Scored) -> list[tuple[Scored, Scored]]:
    """What is compared: the scores of each task that both were given, the first one of one run
    perhaps a further one of the other; and the first ones where their problems alone are the same.
    """
    ours, theirs = ({one.asked[0]: one, **one.also} for one in (a, b))
    found = [(ours[task], theirs[task]) for task in ours if task in theirs]
    firsts = any(one is a and other is b for one, other in found)
    if firsts or (found and not a.score.correct.keys() & b.score.correct.keys()):
        return found
    return [(a, b), *found]


def _asked_otherwise(a: Scored, b: Scored) -> str:
    """In which settings that decide what is right the two differ, as a sentence; "" if in none."""
    parts = [
        f"{name} = {a.settings[name]} and {b.settings[name]}"
        for name in TOLD
        if name in a.settings.keys() & b.settings.keys() and a.settings[name] != b.settings[name]
    ]
    return f"they were not asked alike, {a.name} and {b.name}: {', '.join(parts)}" if parts else ""


def _refuse_asked_otherwise(a: Scored, b: Scored) -> None:
    for what, ours, theirs in zip(("task", "prompt", "answer"), a.asked, b.asked, strict=True):
        if what != "task" and ours and theirs and ours != theirs:
            raise DataError(
                f"{a.name} was scored with {what} = {ours!r}, {b.name} with {theirs!r}: score both "
                "in one way"
            )


def verdict(a: Scored, b: Scored, gap: Difference, on: str = "") -> str:
    """One line: who is better, by how much, how sure."""
    said = {
        "better": f"{a.name} is better than {b.name}",
        "worse": f"{a.name} is worse than {b.name}",
    }.get(gap.verdict, f"no clear difference between {a.name} and {b.name}")
    return (
        f"{said}{on}: {100 * gap.mean:+.1f} points (95 % interval {100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f}, {gap.problems} shared problems)"
    )


def _page(pairs: list[tuple[Scored, Scored]], lines: list[str]) -> Page:
    """The first task's sections, then those of the further ones under their names."""
    (a, b), *further = pairs
    sections = _sections(a, b)
    for (ours, theirs), line in zip(further, lines[1:], strict=True):
        named = [
            replace(one, title=f"{one.title} on {ours.asked[0]}") for one in _sections(ours, theirs)
        ]
        named[0] = replace(named[0], blocks=[Note(f"{line}."), *named[0].blocks])
        sections += named
    return Page(
        about=[f"{a.name} and {b.name}"],
        headline=lines[0],
        question="",
        leads=[f"Task: {a.asked[0]}."],
        sections=sections,
        notes=NOTES,
    )


def _sections(a: Scored, b: Scored) -> list[Section]:
    rows = [
        [
            Cell(one.name),
            Cell(
                percent(one.score.accuracy),
                f"{percent(one.score.low)} to {percent(one.score.high)}",
            ),
            Cell(f"{one.score.problems} × {one.score.samples}"),
            Cell(percent(one.score.unfinished)),
            Cell(f"{one.score.mean_tokens:.0f}"),
        ]
        for one in (a, b)
    ]
    shared = [key for key in a.score.correct if key in b.score.correct]
    differences = [fmean(a.score.correct[key]) - fmean(b.score.correct[key]) for key in shared]
    wins = [
        [Cell(f"{a.name} more often right"), Cell(str(sum(d > 0 for d in differences)))],
        [Cell(f"{b.name} more often right"), Cell(str(sum(d < 0 for d in differences)))],
        [Cell("equally often"), Cell(str(sum(d == 0 for d in differences)))],
    ]
    head = ["", "accuracy", "problems × samples", "unfinished", "tokens"]
    return [
        Section("Scores", [Table(head, rows, "lrrrr")]),
        Section("Problem by problem", [Table(["", "problems"], wins, "lr")]),
        *([Section("Prompt", [Note(a.asked[1])])] if a.asked[1] else []),
    ]
