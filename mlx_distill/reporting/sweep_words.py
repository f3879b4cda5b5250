"""What is said of a sweep: sentences, every number of them computed by `study.py`.

In: `Findings`. Out: the headline, what follows it, and what intervals and costs on the page mean.
"""

from mlx_distill.reporting.condition_words import capital, in_words, subject
from mlx_distill.reporting.run_words import difference_sentence
from mlx_distill.reporting.study import Condition, difference, gain, pareto_front, retention
from mlx_distill.reporting.sweep_findings import (
    Findings,
    cheapest_kept,
    missing,
    nothing_beats_the_base,
    undecided,
    wider_than_its_claim,
)
from mlx_distill.scoring.intervals import Estimate
from mlx_distill.scoring.score import Difference
from mlx_distill.words import DASH, amount, counted, number, percent, points

TOO_FEW = "too few seeds to tell"


def headline(found: Findings) -> str:
    """The first sentence: that nothing beats the undistilled student, where that is so; else the
    cheapest condition that keeps most of the full one's accuracy, else the most accurate one.
    """
    runs = sum(row.role == "student" for row in found.swept.rows)
    if nothing_beats_the_base(found):
        return _nothing_beats(found, found.base)
    if not found.students:
        return (
            f"{found.swept.name}: none of {counted(runs, 'run')} finished."
            if runs
            else f"{found.swept.name}: there is no run yet."
        )
    kept = cheapest_kept(found)
    if kept and found.full:
        return _kept_sentence(found, kept, found.full)
    best = max(found.students, key=lambda one: one.accuracy.mean)
    others = [one for one in found.students if one is not best]
    if not others:
        return capital(
            f"{subject(found.name(best))} solves {_solved(best)} ({_interval(best.accuracy)})."
        )
    second = max(others, key=lambda one: one.accuracy.mean)
    return _difference_sentence(found, best, second) or capital(
        f"{subject(found.name(best))} solves most, {_solved(best)}; "
        f"{subject(found.name(second))} solves {percent(second.accuracy.mean)}, with other seeds."
    )


def _nothing_beats(found: Findings, base: Condition | None) -> str:
    """No condition is better than no training: either none solves more, or the intervals leave it
    open.
    """
    assert base is not None  # else there is nothing to beat
    best = max(found.students, key=lambda one: one.accuracy.mean)
    gap = gain(best, base)
    before = f"the student before training, which solves {percent(base.accuracy.mean)}"
    others = "" if len(found.students) == 1 else f"the best of {len(found.students)} conditions, "
    facts = (
        f"{others}{subject(found.name(best))} solves {percent(best.accuracy.mean)} "
        f"({points(gap.mean)} points, 95\u00a0% interval {points(gap.low)} to {points(gap.high)})."
    )
    if gap.mean <= 0:
        return f"Nothing beats {before}: {facts}"
    return f"Too few seeds to tell whether anything beats {before}: {facts}"


def _kept_sentence(found: Findings, one: Condition, full: Condition) -> str:
    """What a condition keeps of the full one, and at what cost; "" without a shared seed."""
    share = retention(one, full)
    return (
        capital(
            f"{subject(found.name(one))} keeps {percent(share.mean)} of the accuracy of "
            f"{found.name(full)} ({_interval(share)}) "
            f"at {ratio(one, full, 'flops')} of its arithmetic."
        )
        if share
        else ""
    )


def _short_sentence(found: Findings, one: Condition, full: Condition) -> str:
    """The same of another condition, the full one being named already."""
    share = retention(one, full)
    if share is None:
        return ""
    kept = f"keeps {percent(share.mean)} ({range_of(share)}) at {ratio(one, full, 'flops')}"
    unclear = f": {TOO_FEW}" if wider_than_its_claim(share) else ""
    return capital(f"{subject(found.name(one))} {kept}{unclear}.")


def _difference_sentence(found: Findings, a: Condition, b: Condition) -> str:
    gap = difference(a, b)
    if gap is None:
        return ""
    first, second = subject(found.name(a)), subject(found.name(b))
    if undecided(gap):
        return (
            f"{capital(TOO_FEW)} which is better, {first} or {second.removesuffix(',')}: "
            f"{percent(a.accuracy.mean)} against {percent(b.accuracy.mean)}, "
            f"{points(gap.mean)} points, 95\u00a0% interval {points(gap.low)} to "
            f"{points(gap.high)} ({_problems(a):,} shared problems)."
        )
    seen = Difference(gap.mean, gap.low, gap.high, _problems(a), gap.verdict)
    return capital(difference_sentence(first, found.name(b), seen))


def leads(found: Findings) -> list[str]:
    """What follows the headline: the models that all runs share, the other members of the front,
    what is missing.
    """
    models = [
        f"{words} solves {percent(model.accuracy.mean)}"
        for words, model in (
            ("the student before training", found.base),
            ("the teacher", found.teacher),
        )
        if model
    ]
    said = "; ".join(models)
    lines = [f"{capital(said)}."] if said else []
    if nothing_beats_the_base(found):
        lines.append("No best recipe is written: none is known to be better than no training.")
    named, full = cheapest_kept(found), found.full
    if named and full:
        others = [
            _short_sentence(found, one, full)
            for one in pareto_front(found.students)
            if one not in (named, full)
        ]
        lines += [*filter(None, others)]
    elif found.students and found.swept.full and found.full is None:
        label, settings = found.swept.full
        lines.append(
            f"No run of {label or in_words(settings)} has finished, so nothing is compared with it."
        )
    if found.most_seeds == 1:
        lines.append("One seed each: the intervals cover other problems only, not another seed.")
    if found.failed:
        lines.append(f"{counted(len(found.failed), 'run')} did not finish: see Failed runs.")
    if 0 < missing(found) < found.swept.planned:
        lines.append(
            f"{missing(found)} of {counted(found.swept.planned, 'run')} are still to come: "
            "this page describes the others."
        )
    return lines


def notes(found: Findings) -> list[str]:
    """What the intervals and the costs on this page mean."""
    lines = []
    if found.most_seeds == 1:
        lines.append(
            "Every condition was trained with one seed: intervals are 95\u00a0% and cover other "
            "problems only. How much another seed would change a number, one seed cannot tell."
        )
    elif found.students:
        lines.append(
            "Intervals are 95\u00a0% and cover another training seed and other problems together: "
            "the students of all seeds answer the same problems, so seeds and problems are "
            "crossed. Conditions are compared over the seeds and problems that both have, seed by "
            "seed and problem by problem."
        )
        if 1 < len({row.seed for condition in found.students for row in condition.rows}) < 4:
            lines.append(
                "With two or three seeds that differ much, an interval covers somewhat less than "
                "it says."
            )
        if any(len(condition.rows) == 1 for condition in found.students):
            lines.append("Where a condition has one seed, its intervals cover other problems only.")
    shared = [
        words
        for words, model in (
            ("the student before training", found.base),
            ("the teacher", found.teacher),
        )
        if model
    ]
    if shared:
        lines.append(
            f"One model each, so that intervals cover other problems only: {' and '.join(shared)}."
        )
    if found.students:
        lines.append(
            "Costs are means over seeds and count the training steps alone, "
            "without the teacher's shared pass, writing, validation and scoring; "
            "time is clock time of the training steps."
        )
        lines.append(
            "KL is to the teacher, in nats per token, over held-out tokens of the supervised "
            "segments. An answer is well formed where it closes its reasoning once and stops by "
            "itself."
        )
    if found.base and found.full:
        lines.append(
            "The kept gain is (condition − before) / (full − before), full being "
            f"{found.name(found.full)} and before the student before training."
        )
    return lines


def teacher_sentence(found: Findings) -> str:
    """The teacher's kept answers; "" without any."""
    took = found.swept.teacher_pass
    if not took:
        return ""
    return (
        f"{counted(took['runs'], 'run')} read the teacher's answers from a cache of "
        f"{took['sequences']:,} sequences, {amount(took['tokens'])} tokens, "
        f"{amount(took['bytes'], 'B')}."
    )


def _interval(estimate: Estimate) -> str:
    return f"95\u00a0% interval {range_of(estimate)}"


def range_of(estimate: Estimate) -> str:
    return f"{percent(estimate.low)} to {percent(estimate.high)}"


def _solved(condition: Condition) -> str:
    return f"{percent(condition.accuracy.mean)} of {_problems(condition)} problems"


def _problems(condition: Condition) -> int:
    return condition.right.shape[1]


def ratio(one: Condition, other: Condition, cost: str) -> str:
    if not one.cost(cost) or not other.cost(cost):
        return DASH
    share = one.cost(cost) / other.cost(cost)
    return number(share, percent=True, places=0 if share >= 0.1 else 1)
