"""The sequences of a run as numbers: which micro-batches there are, and what they cost.

In: a recipe and its prepared sequences. Out: `Work`: steps, tokens, the shapes of all micro-batches
with their counts. Decided here: nothing; the shapes are those that `data/batches.py` makes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mlx_distill.cost.memory import Micro
from mlx_distill.data.batches import ALL_SEGMENTS, EVERY_TOKEN, Steps
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.selection import is_scored, learned_count
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.training_tables import SelectionTable


def micro_batches(
    lengths: np.ndarray, positions: np.ndarray, size: int, multiple: int
) -> Counter[Micro]:
    """The shapes that `data/batches.py` makes, with their counts: rows [S, G] of examples, each
    sorted by length and cut into groups of `size`.

    `lengths` and `positions` are the examples' tokens and loss tokens, int[S, G].
    """
    order = np.argsort(lengths, axis=1, kind="stable")
    lengths, positions = (
        np.take_along_axis(lengths, order, 1),
        np.take_along_axis(positions, order, 1),
    )
    found: Counter[Micro] = Counter()
    for start in range(0, lengths.shape[1], size):
        group = slice(start, start + size)
        together = lengths[:, group].shape[1]
        longest, supervised = lengths[:, group].max(axis=1), positions[:, group].sum(axis=1)
        padded = -(-np.stack([longest, supervised], 1) // multiple) * multiple
        for (length, supervised), count in zip(
            *np.unique(padded, axis=0, return_counts=True), strict=True
        ):
            found[Micro(together, int(length), int(supervised))] += int(count)
    return found


@dataclass(frozen=True)
class Work:
    """What all steps of a run read, and the shapes of its micro-batches."""

    steps: int
    lengths: np.ndarray  # int[S, G]: tokens of each example of each step
    positions: np.ndarray  # int[S, G]: those that carry loss
    asked: np.ndarray  # int[S, G]: those among which a model's answers choose, where they do
    endings: np.ndarray  # int[S, G]: those that follow a cut and learn from the text alone
    training: Counter[Micro]  # with all positions that are held at once
    learned: Counter[Micro]  # with those that carry loss
    validation: Counter[Micro]

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared) -> "Work":
        table, segments = recipe.batch, recipe.objective.segments
        steps = Steps(
            prepared.train,
            segments,
            table,
            recipe.run.seed,
            recipe.optim.epochs,
            recipe.optim.steps,
        )
        rows = steps.order.all_steps()
        lengths, positions, candidates = _sizes(prepared.train, segments, recipe.selection)
        endings = np.array([sequence.ending for sequence in prepared.train], np.int64)
        at_once = candidates if is_scored(recipe.selection) else positions
        shapes = partial(micro_batches, size=table.micro_batch_size, multiple=table.pad_multiple)
        whole, everything, _ = _sizes(
            sorted(prepared.validation, key=len), ALL_SEGMENTS, EVERY_TOKEN
        )
        held_out = shapes(whole[None], everything[None]) if len(whole) else Counter()
        return cls(
            len(steps),
            lengths[rows],
            positions[rows],
            (candidates - endings)[rows],
            endings[rows],
            shapes(lengths[rows], at_once[rows]),
            shapes(lengths[rows], positions[rows]),
            held_out,
        )

    @property
    def tokens_read(self) -> int:
        return int(self.lengths.sum())

    @property
    def loss_tokens(self) -> int:
        return int(self.positions.sum())

    @property
    def longest(self) -> int:
        """Padded tokens of the longest micro-batch."""
        return max(micro.length for micro in self.training)

    def flops(self, count: Callable[..., dict[str, float]]) -> dict[str, float]:
        """Operations by part of all steps, and those spent on padding."""
        count = partial(count, alone=float(self.endings.sum()))
        parts = count(self.lengths.ravel().tolist(), float(self.positions.sum()))
        lengths, positions = [], 0
        for micro, times in self.learned.items():
            lengths += [micro.length] * (times * micro.sequences)
            positions += times * micro.positions
        padded = count(lengths, float(positions))
        return parts | {"padding": sum(padded.values()) - sum(parts.values())}


def _sizes(
    sequences: Sequence[TokenSequence], segments: tuple[str, ...], selection: SelectionTable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of each sequence, those that carry loss, and those among which they are chosen."""
    counts = [
        (len(sequence), *learned_count(sequence, segments, selection)) for sequence in sequences
    ]
    lengths, positions, candidates = np.array(counts, np.int64).reshape(-1, 3).T
    return lengths, positions, candidates
