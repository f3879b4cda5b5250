"""What the runs of a sweep say together: conditions, their means over training seeds and problems,
and how sure those are.

In: `Row`s, one for each run, as a sweep's `results.csv` keeps them. Out: `Condition`s (the runs
that differ in nothing but the seed), the `Estimate`s of `scoring/intervals.py`, which cover other
seeds and other problems, the Pareto front of accuracy against cost, the best condition for each
budget. Decided here: which runs are paired. Axes: `S` seeds, `P` problems.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import DataError, NotFound
from mlx_distill.readers import parse_json, read_text
from mlx_distill.reporting.condition_words import in_words
from mlx_distill.scoring.intervals import Estimate, crossed_difference, crossed_mean, crossed_ratio

DONE = "done"
# the label of arms that read as many tokens as whole sequences, of more examples
MATCHED = "token-matched"
BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the dearest condition's cost


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    role: "student", or "teacher" and "base" for the models that every run shares (their settings
    are {} and their cost is 0). settings: what sets the run apart from the sweep's base, by
    `table.field`, the seed aside. status: `DONE`, or the line that says why there is no result;
    numbers are 0 then. right: the share of right answers to each problem, in the problems' order;
    problems: a digest of which ones. flops, tokens_read, loss_tokens and train_seconds are of all
    training steps (a teacher pass that was shared, validation and scoring aside); peak_bytes is the
    largest of them.
    """

    run: str
    role: str
    label: str
    settings: dict[str, Any]
    seed: int
    status: str = DONE
    accuracy: float = 0.0
    unfinished: float = 0.0
    well_formed: float = 0.0
    mean_tokens: float = 0.0
    steps: int = 0
    exported_step: int = 0
    tokens_read: int = 0
    loss_tokens: int = 0
    flops: float = 0.0
    train_seconds: float = 0.0
    peak_bytes: int = 0
    kl: float = float(
        "nan"
    )  # to the teacher, over held-out tokens of the supervised segments; nan: not measured
    backend: str = ""
    device: str = ""
    commit: str = ""
    problems: str = ""
    right: tuple[float, ...] = ()


def rows_text(rows: Sequence[Row]) -> str:
    """CSV, one line a run. `right` is one digit a problem where there was one answer to each, else
    shares with a blank between.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Row)])
    for row in rows:
        whole = all(share in (0.0, 1.0) for share in row.right)
        right = (
            "".join(str(int(share)) for share in row.right)
            if whole
            else " ".join(map(repr, row.right))
        )
        values = dataclasses.asdict(row) | {
            "settings": json.dumps(row.settings, default=str),
            "right": right,
        }
        writer.writerow(values.values())
    return file.getvalue()


def read_rows(path: Path) -> list[Row]:
    """What `rows_text` made; raises `NotFound` or `DataError`."""
    try:
        text = read_text(path)
    except NotFound:
        raise NotFound(f"no results at {path}: run the sweep first") from None
    try:
        return [_row(fields) for fields in csv.DictReader(io.StringIO(text, newline=""))]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} holds no results of this version ({error!r}): run the sweep again"
        ) from None


def _row(fields: dict[str, str]) -> Row:
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    read: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: float}
    values: dict[str, Any] = {
        name: read[kinds[name]](text) for name, text in fields.items() if kinds[name] in read
    }
    right = fields["right"]
    shares = right.split() if " " in right or "." in right else right
    return Row(
        **values,
        settings=parse_json(fields["settings"], "settings"),
        right=tuple(float(share) for share in shares),
    )


@dataclass(frozen=True)
class Condition:
    """The runs that differ in nothing but the seed, ordered by it."""

    label: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]

    @cached_property
    def key(self) -> str:
        """What its runs have in common, and no other condition has."""
        return _key(self.label, self.settings)

    @property
    def name(self) -> str:
        """Its label, else its settings in words."""
        return self.label or in_words(self.settings) or "as in the recipe"

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(row.seed for row in self.rows)

    @cached_property
    def right(self) -> np.ndarray:
        """float64 [S, P]: the share of right answers."""
        return np.array([row.right for row in self.rows])

    @cached_property
    def accuracy(self) -> Estimate:
        """Over seeds and problems."""
        return crossed_mean(self.right)

    def cost(self, name: str) -> float:
        """The mean over seeds of a number that a row holds: flops, tokens_read, train_seconds,
        peak_bytes.
        """
        return float(np.mean([getattr(row, name) for row in self.rows]))


def conditions(rows: Iterable[Row], role: str = "student") -> list[Condition]:
    """The finished runs of a role by condition, in the order in which they first appear.

    Raises `DataError` where two runs answered other problems: their scores cannot be set side by
    side.
    """
    found: dict[str, list[Row]] = {}
    done = [row for row in rows if row.role == role and row.status == DONE]
    if len({row.problems for row in done}) > 1:
        raise DataError(
            f"the {role}s of this sweep were scored on different problems: keep [eval] the same "
            "in all of its runs"
        )
    for row in done:
        found.setdefault(_key(row.label, row.settings), []).append(row)
    return [
        Condition(group[0].label, group[0].settings, tuple(sorted(group, key=lambda row: row.seed)))
        for group in found.values()
    ]


def _key(label: str, settings: dict[str, Any]) -> str:
    return json.dumps([label, settings])


# comparisons


def difference(a: Condition, b: Condition) -> Estimate | None:
    """a − b in accuracy, paired over the seeds and problems that both have; None where they share
    no seed.
    """
    pair = _shared(a, b)
    return pair and crossed_difference(pair[0] - pair[1])


def retention(a: Condition, full: Condition) -> Estimate | None:
    """The accuracy of `a` as a share of that of `full`; None where they share no seed or `full`
    solves nothing.
    """
    pair = _shared(a, full)
    return pair and crossed_ratio(*pair)


def gain_retention(a: Condition, full: Condition, base: Condition) -> Estimate | None:
    """(a − base) / (full − base): what `a` keeps of full's gain over the undistilled student; None
    where there is no gain.
    """
    pair = _shared(a, full)
    return pair and crossed_ratio(pair[0] - base.right.mean(0), pair[1] - base.right.mean(0))


def gain(a: Condition, base: Condition) -> Estimate:
    """a − base in accuracy, the base being one model that every seed began with."""
    return crossed_difference(a.right - base.right.mean(0))


def worth_training(found: Sequence[Condition], base: Condition | None) -> list[Condition]:
    """The conditions that beat the undistilled student, as far as their seeds and problems tell;
    all of them where it was not scored.
    """
    return [one for one in found if base is None or gain(one, base).verdict == "better"]


def _shared(a: Condition, b: Condition) -> tuple[np.ndarray, np.ndarray] | None:
    seeds = [seed for seed in a.seeds if seed in b.seeds]
    if not seeds:
        return None
    return a.right[[a.seeds.index(seed) for seed in seeds]], b.right[
        [b.seeds.index(seed) for seed in seeds]
    ]


# quality against cost


def pareto_front(found: Sequence[Condition], cost: str = "flops") -> list[Condition]:
    """Those that no other beats in accuracy at the same or a lower cost, the cheapest first. A cost
    of 0 is an unknown one: such conditions are left out.
    """
    front: list[Condition] = []
    known = [one for one in found if one.cost(cost) > 0]
    for condition in sorted(known, key=lambda one: (one.cost(cost), -one.accuracy.mean)):
        if not front or condition.accuracy.mean > front[-1].accuracy.mean:
            front.append(condition)
    return front


def best_within(
    found: Sequence[Condition], share: float, base: Condition | None = None, cost: str = "flops"
) -> Condition | None:
    """The most accurate condition that costs at most `share` of the dearest one and beats `base`,
    the undistilled student; None where there is none.
    """
    most = share * max((one.cost(cost) for one in found), default=0.0)
    front = pareto_front(worth_training(found, base), cost)
    affordable = [one for one in front if one.cost(cost) <= most]
    return affordable[-1] if affordable else None
