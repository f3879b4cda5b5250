"""Scores: a model answers a task's problems, and the share it gets right is stated with its
uncertainty.

In: anything that can `generate`, a tokenizer, a `Task`. Out: a `Score`, the `Difference` of two,
the `Retention` of a student. Decided here: what counts as finished. All intervals are 95 % and
cover the choice of problems (and the sampling of answers), not the choice of a training seed; how
they are made is in `scoring/intervals.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from mlx_distill import verify
from mlx_distill.backends import draws
from mlx_distill.backends.protocol import Sampling
from mlx_distill.data.examples import Skip
from mlx_distill.data.sequences import generation_prompt
from mlx_distill.data.sequences import stop_ids as ends_of_answers
from mlx_distill.errors import DataError
from mlx_distill.recipe.training_tables import EvalTable
from mlx_distill.runs.record import Count, Number, Record
from mlx_distill.scoring.generations import Generation, Generations
from mlx_distill.scoring.intervals import interval, paired, pass_at
from mlx_distill.verify.tasks import AFTER_THINK, ANYWHERE, THINK_END, Problem, Task

QUANTILES = (0.5, 0.9, 1.0)
KEYED = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "samples",
    "batch_size",
)  # what generated texts depend on


class Writer(Protocol):
    """Whatever answers prompts, as a `Model` does."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]: ...


class Score(Record):
    """How a model did on a task.

    accuracy, low, high: mean over problems of the share of right answers, and its 95 % interval
    (see `interval`). correct: for each problem id, 1.0 or 0.0 for each sample. unfinished: share of
    generations without a stop token or without `</think>`; they count as wrong. well_formed: share
    with exactly one `</think>` and a stop token. mean_tokens: new tokens a generation, stop token
    included. seconds: the time that generating took. tokens_at: quantiles of their number ("0.5" the
    median, "1" the longest). pass_at: by k (1, 2, 4, … and `samples`) the mean over problems of the
    chance that one of k samples is right, and its interval (see `pass_at`); accuracy is avg@samples.
    """

    accuracy: Number
    low: Number
    high: Number
    problems: Count
    samples: Count
    correct: dict[str, Annotated[list[Number], Field(min_length=1)]] = Field(min_length=1)
    unfinished: Number
    well_formed: Number
    mean_tokens: Number
    seconds: Number
    tokens_at: dict[str, Number] = Field(default_factory=dict)
    pass_at: dict[str, tuple[Number, Number, Number]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """a − b in accuracy over the problems both were given, with its 95 % interval (see `compare`)."""

    mean: float
    low: float
    high: float
    problems: int
    verdict: str  # "better", "worse" or "no clear difference"


@dataclass(frozen=True)
class Retention:
    """What a student keeps of a full model: `accuracy` = student / full, `gain` = (student − base)
    / (full − base).

    None where the divisor is not positive, so that there is nothing to keep.
    """

    accuracy: float | None
    gain: float | None


def score(
    model: Writer,
    tokenizer: Any,
    task: Task,
    settings: EvalTable,
    progress: Callable[[int], None] = lambda done: None,
    stop_ids: frozenset[int] = frozenset(),
    day: str = "",
    kept: Generations | None = None,
) -> Score:
    """Generate `settings.samples` answers to every problem of `task` and score them.

    `model` needs nothing but `generate`. `stop_ids` are token ids that end an answer besides the
    tokenizer's own, `day` is what prompts say where their template reads the clock. With `kept`
    each batch is written down as it is judged, and one that is there already is not generated
    again: batches and random numbers depend on the arguments alone, so the score is the same either
    way. Raises `DataError` for a task without problems (there is no accuracy of nothing) or
    with one that the chat template refuses.
    """
    if not task.problems:
        raise DataError(
            f"task {task.name!r} has no problems to score: check its file, or raise [eval] examples"
        )
    stops = stop_ids | ends_of_answers(tokenizer)
    problems = {problem.id: problem for problem in task.problems}
    prompts = {problem.id: _prompt_ids(problem, task, tokenizer, day) for problem in task.problems}
    _refuse_hopeless(task, settings, tokenizer)
    batches = _batches(prompts, settings)
    if kept:
        golds = {problem.id: [problem.expected, problem.compared] for problem in task.problems}
        kept.begin(
            batches,
            prompts=prompts,
            golds=golds,
            stops=sorted(stops),
            verifier=verify.VERSION,
            settings=settings.model_dump(include=set(KEYED)),
            **({"draws": draws.VERSION} if settings.temperature else {}),
            **({"answer": task.answer} if task.answer != AFTER_THINK else {}),
        )
    found = dict(kept.kept) if kept else {}
    for batch in batches:
        if all(one in found for one in batch):
            progress(len(batch))
            continue
        sampling = Sampling(
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.seed,
            settings.batch_size,
            stops,
            tuple(sample for _, sample in batch),
        )
        started = time.perf_counter()
        texts = {}
        for place, ids in model.generate([prompts[problem] for problem, _ in batch], sampling):
            texts[place] = ids
            progress(1)
        seconds = (time.perf_counter() - started) / len(batch)
        rows = [
            judge(texts[place], problems[problem], sample, seconds, task, tokenizer, stops)
            for place, (problem, sample) in enumerate(batch)
        ]
        found |= {(row.problem, row.sample): row for row in rows}
        if kept:
            kept.add(rows)
    return summarize(task.problems, found, settings.samples)


def _refuse_hopeless(task: Task, settings: EvalTable, tokenizer: Any) -> None:
    """Raise `DataError` for a named task none of whose answers fits into the tokens that a
    generation may have.
    """
    if settings.max_new_tokens >= task.tokens:
        return
    before = THINK_END if task.answer == AFTER_THINK else ""
    texts = [before + problem.expected for problem in task.problems]
    shortest = 1 + min(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    if shortest > settings.max_new_tokens:
        raise DataError(
            f"task {task.name!r}: eval.max_new_tokens is {settings.max_new_tokens}, and its shortest "
            f"answer alone takes {shortest} tokens, so that every problem would count as wrong; "
            f"it is reported with {task.tokens:,}: raise it"
        )


def _batches(prompts: dict[str, list[int]], settings: EvalTable) -> list[list[tuple[str, int]]]:
    """(problem, sample)s by batch, the longest prompts first: they need the most memory."""
    asked = [(problem, sample) for problem in prompts for sample in range(settings.samples)]
    asked.sort(key=lambda one: -len(prompts[one[0]]))
    return [
        asked[start : start + settings.batch_size]
        for start in range(0, len(asked), settings.batch_size)
    ]


def judge(
    ids: list[int],
    problem: Problem,
    sample: int,
    seconds: float,
    task: Task,
    tokenizer: Any,
    stop_ids: frozenset[int],
) -> Generation:
    """One generation's verdict: it can only be right if it stopped by itself and closed its
    reasoning with `</think>`, unless the answer is looked for anywhere.
    """
    stopped = bool(ids) and ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
    ends = text.count(THINK_END)
    finished = stopped and (ends > 0 or task.answer == ANYWHERE)
    return Generation(
        problem=problem.id,
        sample=sample,
        prompt=problem.prompt,
        gold=problem.expected,
        compared=problem.compared,
        text=text,
        correct=(finished or task.answer == ANYWHERE) and task.verify(problem.expected, text),
        finished=finished,
        well_formed=stopped and ends == 1,
        tokens=len(ids),
        seconds=seconds,
    )


def summarize(
    problems: list[Problem], found: dict[tuple[str, int], Generation], samples: int
) -> Score:
    """The `Score` of the generations that were `found` by problem and sample."""
    answers = [found[problem.id, sample] for problem in problems for sample in range(samples)]
    correct = {
        problem.id: [float(found[problem.id, sample].correct) for sample in range(samples)]
        for problem in problems
    }
    low, high = interval(correct.values())
    return Score(
        accuracy=fmean(map(fmean, correct.values())),
        low=low,
        high=high,
        problems=len(problems),
        samples=samples,
        correct=correct,
        unfinished=fmean(not answer.finished for answer in answers),
        well_formed=fmean(answer.well_formed for answer in answers),
        mean_tokens=fmean(answer.tokens for answer in answers),
        tokens_at={
            f"{share:g}": float(np.quantile([answer.tokens for answer in answers], share))
            for share in QUANTILES
        },
        pass_at={
            str(k): (found.mean, found.low, found.high)
            for k in _counts(samples)
            for found in [pass_at(correct.values(), k)]
        },
        seconds=sum(answer.seconds for answer in answers),
    )


def _counts(samples: int) -> list[int]:
    """1, 2, 4, … and the number of samples itself; nothing where there is one sample alone."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def compare(a: Score, b: Score) -> Difference:
    """a − b, paired over the problems that both answered.

    The interval is `intervals.paired`'s. Raises `DataError` where no problem is shared.
    """
    shared = [key for key in a.correct if key in b.correct]
    if not shared:
        raise DataError(
            "two scores share no problem, so they cannot be compared: score both on the same task "
            "and seed"
        )
    differences = [fmean(a.correct[key]) - fmean(b.correct[key]) for key in shared]
    gap = paired(differences)
    return Difference(gap.mean, gap.low, gap.high, len(shared), gap.verdict)


def retention(student: Score, base: Score, full: Score) -> Retention:
    """What `student`, which was `base` before, keeps of `full` (its teacher, or the student of
    whole sequences).
    """
    gain = full.accuracy - base.accuracy
    return Retention(
        accuracy=student.accuracy / full.accuracy if full.accuracy > 0 else None,
        gain=(student.accuracy - base.accuracy) / gain if gain > 0 else None,
    )


def describe(score: Score) -> str:
    """One line for a terminal: accuracy with its interval, what did not finish, tokens."""
    several = ""
    if score.samples > 1 and str(score.samples) in score.pass_at:
        mean, low, high = score.pass_at[str(score.samples)]
        several = f"pass@{score.samples} {mean:.1%} ({low:.1%} to {high:.1%}), "
    spread = ""
    if score.tokens_at:
        spread = f" (median {score.tokens_at['0.5']:.0f}, longest {score.tokens_at['1']:.0f})"
    return (
        f"{score.accuracy:.1%} right (95 % interval {score.low:.1%} to {score.high:.1%}, "
        f"{score.problems} problems{f' × {score.samples} samples' if score.samples > 1 else ''}), "
        f"{several}{score.unfinished:.1%} unfinished, "
        f"{score.mean_tokens:.0f} tokens a generation{spread}, "
        f"{score.seconds:.0f} s"
    )


def _prompt_ids(problem: Problem, task: Task, tokenizer: Any, day: str) -> list[int]:
    try:
        return generation_prompt((("user", problem.prompt),), tokenizer, day=day).tokens
    except Skip as skip:
        raise DataError(
            f"task {task.name!r}: problem {problem.prompt[:60]!r} cannot be asked: {skip}; remove it"
        ) from None
