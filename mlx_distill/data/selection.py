"""Which of a sequence's supervised tokens carry loss, and how much each of them weighs.

In: a sequence, the `[selection]` table and the epoch. Out: the same with `ceil(share * n)` of its n
supervised tokens left, where the rule asks no model; `narrowing.py` does the same to a batch that
a model was asked about. Decided here: how many are chosen, what a rule chooses, and that weights by
place have mean 1 in a sequence, so that a step's divisor is known before anything is computed.
What follows a cut (`TokenSequence.ending`) always carries loss, and weighs 1.
"""

import math
from dataclasses import replace

import numpy as np

from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.truncate import random_of
from mlx_distill.recipe.training_tables import SelectionTable

SELECTED = 2  # random numbers for which tokens carry loss
# rules that ask a model, by what they rank
SCORED = ("student_entropy", "teacher_entropy", "divergence")


def is_scored(table: SelectionTable) -> bool:
    """Whether a model has to be asked which tokens are chosen."""
    return table.share < 1 and table.by in SCORED


def chosen_count(share: float, supervised: np.ndarray | int) -> np.ndarray:
    """ceil(share * n), where a product that is a whole number but for rounding stays one."""
    return np.ceil(np.round(share * np.asarray(supervised), 9)).astype(np.int64)


def place_weights(kind: str, rows: np.ndarray) -> np.ndarray:
    """The weight of each chosen token by its place in its row, float32[n], with mean 1 in a row;
    rows int[n] never fall.
    """
    if kind == "flat":
        return np.ones(len(rows), np.float32)
    count, place = places_in_rows(rows)
    rank = place + 1 if kind == "rising" else count - place
    return (2 * rank / (count + 1)).astype(np.float32)


def select_known(
    sequence: TokenSequence,
    segments: tuple[str, ...],
    table: SelectionTable,
    seed: int,
    epoch: int,
) -> TokenSequence:
    """The sequence as an epoch learns it where the rule asks no model: a random choice, which
    depends on seed, epoch and the example's id alone, or its last or first tokens.
    """
    if table.share == 1 or is_scored(table):
        return sequence
    window = len(sequence) - sequence.ending
    supervised = np.flatnonzero(sequence.supervised(segments)[:window])
    count = int(chosen_count(table.share, len(supervised)))
    if table.by == "random":
        drawn = epoch if table.redraw == "epoch" else 0
        ranked = random_of(seed, sequence.id, SELECTED, drawn).permutation(supervised)
    else:
        ranked = supervised[::-1] if table.position_weight == "rising" else supervised
    allowed = np.zeros(len(sequence), bool)
    allowed[ranked[:count]] = True
    return replace(sequence, allowed=allowed)


def learned_count(
    sequence: TokenSequence, segments: tuple[str, ...], table: SelectionTable
) -> tuple[int, int]:
    """How many tokens of a sequence carry loss by the table, and how many the rule chooses among;
    what follows a cut is in both.
    """
    supervised = int(sequence.supervised(segments).sum())
    asked = supervised - sequence.ending
    return int(chosen_count(table.share, asked)) + sequence.ending, supervised


def places_in_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each entry of rows int[n], which never fall, how many its row has, and how many of them
    stand before it.
    """
    if not len(rows):
        return rows, rows
    counts = np.bincount(rows)
    starts = np.cumsum(counts) - counts
    return counts[rows], np.arange(len(rows)) - starts[rows]


def describe(table: SelectionTable) -> str:
    """For a person: what the table chooses and weighs, "" where it leaves all as it is."""
    parts = []
    if table.share < 1:
        when = " drawn once" if table.by == "random" and table.redraw == "once" else ""
        words = {"random": "at random", "position": "by position"}
        rule = words.get(table.by, f"of the highest {table.by.replace('_', ' ')}")
        parts.append(f"{math.ceil(1000 * table.share) / 10:g} % of them {rule}{when}")
    if table.position_weight != "flat":
        parts.append(f"weights {table.position_weight} with position")
    return ", ".join(parts)
