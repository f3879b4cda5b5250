"""What is said of runs: sentences, every one computed from the runs' files.

In: `Run`s. Out: sentences. Decided here: what comes first, and that a tie has no winner.
"""

from collections.abc import Sequence

from mlx_distill.reporting.condition_words import joined
from mlx_distill.reporting.kept_run import SEGMENTS, Compared, Run, before_after, kl_before_after
from mlx_distill.reporting.run_charts import SEGMENT_NAMES
from mlx_distill.scoring.score import Difference, Score, compare, retention
from mlx_distill.words import number, percent, points


def headline(runs: Sequence[Run]) -> str:
    """The first sentence of the report: what came out, in numbers of the runs' files."""
    if len(runs) == 1:
        return headline_of_one(runs[0])
    groups = by_task(runs)
    if not groups:
        return f"{len(runs)} runs, none of them scored."
    if len(groups) > 1:
        best = "; ".join(f"on {task} {_best(members)}" for task, members in groups.items())
        return f"{len(runs)} runs on {len(groups)} tasks: {best}."
    (members,) = groups.values()
    tied = _highest(members)
    if len(tied) > 1:
        return (
            f"{joined([run.name for run in tied])} share the highest score of {len(runs)} runs: "
            f"their students solve {_solved(tied[0])}."
        )
    return (
        f"{tied[0].name} scores highest of {len(runs)} runs: its student solves {_solved(tied[0])}."
    )


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The scored runs of each task, the highest score first."""
    groups: dict[str, list[Run]] = {}
    for run in _ranked(runs):
        groups.setdefault(run.task, []).append(run)
    named = dict.fromkeys(run.task for run in runs)
    return {task or "a task without a name": groups[task] for task in named if task in groups}


def _highest(ranked: Sequence[Run]) -> list[Run]:
    """The first of them, and those that share its score."""
    most = ranked[0].scores["student"].accuracy
    return [run for run in ranked if run.scores["student"].accuracy == most]


def _best(ranked: Sequence[Run]) -> str:
    tied = _highest(ranked)
    verb = "scores" if len(tied) == 1 else "score"
    return f"{joined([run.name for run in tied])} {verb} highest, {_solved(tied[0])}"


def leads(runs: Sequence[Run]) -> list[str]:
    """What follows the headline: of one run its `subline`, of several how the highest on each task
    compares with each other run there.
    """
    if len(runs) == 1:
        return subline(runs[0])
    said = []
    for best, *others in by_task(runs).values():
        said += [
            difference_sentence(
                best.name, other.name, compare(best.scores["student"], other.scores["student"])
            )
            for other in others
            if shared(best.scores["student"], other.scores["student"])
        ]
    return said


def _ranked(runs: Sequence[Run]) -> list[Run]:
    return sorted(
        (run for run in runs if "student" in run.scores),
        key=lambda run: -run.scores["student"].accuracy,
    )


def shared(a: Score, b: Score) -> bool:
    """Whether two models answered a problem in common."""
    return bool(a.correct.keys() & b.correct.keys())


def _solved(run: Run) -> str:
    student = run.scores["student"]
    return f"{percent(student.accuracy)} of {student.problems:,} problems"


def headline_of_one(run: Run) -> str:
    """What came out of a run."""
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    if student is None:
        first, last = kl_before_after(run)
        if first is None or last is None:
            return f"{run.name} has not been scored."
        change = f"went from {number(first)} to {number(last)}"
        if number(first) == number(last):
            change = f"is unchanged at {number(last)}"
        return (
            f"{run.name} has not been scored; its validation KL to the teacher {change} "
            "nats per token."
        )
    before = f", {_direction(student, base)} {percent(base.accuracy)} before" if base else ""
    other = f"; the teacher solves {percent(teacher.accuracy)}" if teacher else ""
    return f"The student solves {_solved(run)}{before}{other}."


def _direction(student: Score, base: Score) -> str:
    if student.accuracy == base.accuracy:
        return "as many as the"
    return "up from" if student.accuracy > base.accuracy else "down from"


def subline(run: Run) -> list[str]:
    """What follows the headline: what is kept of the teacher, and how each compared run did."""
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    parts = []
    if student and base and teacher:
        kept = retention(student, base, teacher)
        if kept.accuracy is not None:
            parts.append(f"{percent(kept.accuracy)} of the teacher's accuracy")
        if kept.gain is not None:
            parts.append(f"{percent(kept.gain)} of its lead over the student before")
    said = [f"{run.name} reaches {' and '.join(parts)}."] if parts else []
    return said + [_compared_sentence(run, other) for other in run.compared]


def _compared_sentence(run: Run, other: Compared) -> str:
    if other.difference is None:
        return other.obstacle
    return difference_sentence(run.name, f"{other.name} ({other.method})", other.difference)


def difference_sentence(a: str, b: str, difference: Difference) -> str:
    """A `Difference` in words, saying whether its interval excludes zero."""
    zero = "includes" if difference.low <= 0 <= difference.high else "excludes"
    facts = (
        f"{points(difference.mean)} points, 95\u00a0% interval {points(difference.low)} to "
        f"{points(difference.high)}, which {zero} zero ({difference.problems:,} shared problems)."
    )
    if difference.verdict == "no clear difference":
        return f"No clear difference between {a} and {b}: {facts}"
    return f"{a} is {difference.verdict} than {b}: {facts}"


def progress(run: Run) -> str:
    """A line for a run that is not finished; empty for one that is, or that does not say."""
    if run.manifest.finished or run.manifest.steps is None:
        return ""
    done = run.metrics[-1].step if run.metrics else 0
    return (
        f"This run is not finished: it stands at step {done:,} of {run.manifest.steps:,}, "
        "and what follows describes it so far."
    )


def kl_sentence(run: Run) -> str:
    """How near the teacher the student was and is; empty where that was not measured."""
    first, last = kl_before_after(run)
    if first is None or last is None:
        return ""
    asked = "KL to the teacher over held-out tokens of the supervised segments"
    if number(first) == number(last):
        return f"{asked}: unchanged at {number(last)} nats per token."
    return (
        f"{asked}: "
        f"{number(first)} nats per token before training, {number(last)} at the student's step."
    )


def worse_sentence(run: Run) -> str:
    """Which unsupervised segments got worse on held-out sequences; "" where none did."""
    supervised = run.recipe.objective.segments if run.recipe else SEGMENTS
    worse = [_got_worse(run, part) for part in SEGMENTS if part not in supervised]
    said = ", ".join(filter(None, worse))
    return f"Not supervised, and worse than before training: {said}." if said else ""


def _got_worse(run: Run, part: str) -> str:
    """How much, by the teacher where there is one; "" where it did not."""
    name, what = f"kl_{part}", "KL to the teacher"
    if all(name not in row.numbers for row in run.validation):
        name, what = f"ce_{part}", "cross-entropy"
    first, last = before_after(run, lambda row: row.numbers.get(name))
    if first is None or last is None or last <= first or number(first) == number(last):
        return ""
    change = f"{what} from {number(first)} to {number(last)} nats per token"
    return f"the {SEGMENT_NAMES[part]} ({change})"
