"""`TokenSequence`s → optimizer `Step`s of padded `Batch`es.

In: cut sequences, the supervised segments, the `[batch]` table. Out: numpy arrays that any backend
can train on. Decided here: the order in which examples are seen, which share an optimizer step, how
they are padded, and which positions predict which targets. Shifting happens here, once: `positions`
point at the token *before* each supervised token, `targets` at the token itself. Indices are
checked here too, since MLX does not check them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mlx_distill.data.selection import is_scored, learned_count, place_weights, select_known
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DataError
from mlx_distill.recipe.training_tables import BatchTable, SelectionTable

SORTED = 0x736F7274  # tells a window's random numbers from an epoch's
ALL_SEGMENTS = ("prompt", "cot", "answer")
EVERY_TOKEN = SelectionTable()


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tokens `int32[B, T]` (padded at the right with 0), positions `int32[N]` into the flattened
    `[B*T]`, targets `int32[N]`, segment `int8[N]` (the `Segment` of the target), weight
    `float32[N]` (its sequence's, or 0 where N itself is padded), lengths `int32[B]` (real tokens),
    ids `tuple[str, ...]` of length B. Positions that pad N point at position 0 and target 0: valid
    to gather, and never to be counted. endings `int32[B]` are the tokens at the end of each row
    that follow a cut (`TokenSequence.ending`), None in a run that has none. The teacher is asked at
    the first `taught` positions alone; the others, those of endings, learn from the text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    segment: np.ndarray
    weight: np.ndarray
    lengths: np.ndarray
    ids: tuple[str, ...]
    endings: np.ndarray | None = None

    @property
    def taught(self) -> int:
        """How many of the N positions are the teacher's to answer, all where there are no endings."""
        if self.endings is None or not self.endings.any():
            return len(self.weight)
        row, place = np.divmod(self.positions, self.tokens.shape[1])
        alone = np.flatnonzero(place + 1 >= (self.lengths - self.endings)[row])
        return int(alone[0]) if len(alone) else len(self.weight)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches, the summed weight of the tokens that carry loss in all
    of them, and how many those are. Where a model is asked which ones (`selection.is_scored`), the
    batches hold all candidates.
    """

    index: int
    batches: tuple[Batch, ...]
    loss_tokens: float
    tokens: int  # real (unpadded) tokens read
    positions: int
    new: frozenset[str] = frozenset()  # ids of what no earlier epoch read


class Order:
    """Which examples each step takes, by number: one endless stream, a seeded permutation of all
    `examples` for each epoch, one after the other.

    Step i takes exactly `global_batch_size` of them, from `i * global_batch_size` on, so a step may
    hold the end of one epoch and the start of the next. A `Window` deals the examples of several
    steps anew to these. Without `steps` there are as many as it
    takes to see every example `epochs` times at least. Raises `DataError` where a step asks for
    more examples than there are.
    """

    def __init__(
        self,
        examples: int,
        size: int,
        seed: int,
        epochs: int = 1,
        steps: int = 0,
        window: "Window | None" = None,
        shuffle: bool = True,
    ):
        if size > examples:
            raise DataError(
                f"batch.global_batch_size is {size}, but only {examples} training examples carry "
                "loss; lower it"
            )
        self._examples, self._size, self._seed = examples, size, seed
        self._count = steps or -(-epochs * examples // size)
        self._window, self._shuffle = window, shuffle
        # drawn once for all of an epoch's steps, and for all steps of a window
        self._permutation = lru_cache(maxsize=2)(self._drawn)
        self._dealt = lru_cache(maxsize=2)(self._deal)

    def __len__(self) -> int:
        return self._count

    def of_step(self, index: int) -> list[int]:
        """The examples of step `index`, counted from 0. Raises `IndexError` for one that there is
        not.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"step {index} of {self._count}")
        if self._window is None:
            return self.rows(index * self._size, self._size)
        begin = index - index % self._window.steps
        return self._dealt(begin)[index - begin].tolist()

    def all_steps(self) -> np.ndarray:
        """The examples of every step, int[S, G]."""
        if self._window is None:
            rows = self.rows(0, self._count * self._size)
            return np.array(rows).reshape(self._count, self._size)
        begins = range(0, self._count, self._window.steps)
        return np.concatenate([self._dealt(begin) for begin in begins])

    def _deal(self, begin: int) -> np.ndarray:
        """The examples of the window of steps from `begin` on, int[steps, G]."""
        assert self._window is not None
        count = min(self._window.steps, self._count - begin)
        taken = np.array(self.rows(begin * self._size, count * self._size))
        random = np.random.default_rng([self._seed, begin, SORTED])
        return self._window.deal(taken.reshape(count, self._size), random)

    def epochs_of_step(self, index: int) -> list[int]:
        """In which epoch each example of a step is seen, counted from 0; of one that a window has
        twice the first time is the earlier epoch's.
        """
        steps = self._window.steps if self._window else 1
        begin = index - index % steps
        start, count = begin * self._size, min(steps, self._count - begin) * self._size
        dealt = self._dealt(begin).ravel() if self._window else np.array(self.of_step(index))
        epochs = np.empty(count, np.int64)
        taken = np.array(self.rows(start, count))
        places = np.arange(start, start + count) // self._examples
        epochs[np.argsort(dealt, kind="stable")] = places[np.argsort(taken, kind="stable")]
        return epochs.reshape(-1, self._size)[index - begin].tolist()

    def rows(self, start: int, count: int) -> list[int]:
        """Places in the stream `[start, start + count)` → examples."""
        n, stop = self._examples, start + count
        parts = [
            self._permutation(epoch)[max(0, start - epoch * n) : stop - epoch * n]
            for epoch in range(start // n, (stop - 1) // n + 1)
        ]
        return np.concatenate(parts).tolist()

    def _drawn(self, epoch: int) -> np.ndarray:
        """All examples in the order of an epoch."""
        if not self._shuffle:
            return np.arange(self._examples)
        return np.random.default_rng([self._seed, epoch]).permutation(self._examples)


@dataclass(frozen=True)
class Window:
    """So many steps, whose examples, of these `lengths`, are sorted together into micro-batches of
    `size`: the longer the window, the less padding.

    A step still averages over short and long examples: it takes one micro-batch of each range of
    lengths, and in every other range the longer ones go to the steps with the shorter ones of the
    range before, so that steps are about equally long. Which step gets which is drawn.
    """

    steps: int
    size: int
    lengths: np.ndarray

    def deal(self, taken: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The examples `taken` [steps, G], dealt anew to these steps."""
        steps, total = taken.shape
        rows = taken.ravel()
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        ranges: list[np.ndarray] = []
        for start in range(0, total, self.size):
            width = min(self.size, total - start)
            alike = rows[steps * start : steps * (start + width)].reshape(steps, width)
            ranges.append(alike if len(ranges) % 2 == 0 else alike[::-1])
        return random.permutation(np.concatenate(ranges, axis=1))


class Steps:
    """The optimizer steps of a run over rows that lie there from the start, in an `Order`."""

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        segments: tuple[str, ...],
        batch: BatchTable,
        seed: int,
        epochs: int = 1,
        steps: int = 0,
        selection: SelectionTable = EVERY_TOKEN,
    ):
        window = None
        if batch.sort_window > 1:
            lengths = np.array([len(sequence) for sequence in sequences])
            window = Window(batch.sort_window, batch.micro_batch_size, lengths)
        size = batch.global_batch_size
        self.order = Order(len(sequences), size, seed, epochs, steps, window, batch.shuffle)
        self._sequences, self._segments, self._batch = sequences, segments, batch
        self._selection, self._seed = selection, seed
        # of any example, so that all ranks make batches of one kind
        self._endings = any(sequence.ending for sequence in sequences)

    def __len__(self) -> int:
        return len(self.order)

    def step(self, index: int) -> Step:
        """Step `index`, counted from 0. Raises `IndexError` for one that there is not."""
        segments, selection = self._segments, self._selection
        rows, epochs = self.order.of_step(index), self.order.epochs_of_step(index)
        taken = [
            select_known(self._sequences[row], segments, selection, self._seed, epoch)
            for row, epoch in zip(rows, epochs, strict=True)
        ]
        new = (one.id for one, epoch in zip(taken, epochs, strict=True) if not epoch)
        step = make_step(index, taken, segments, self._batch, self._endings, selection)
        return replace(step, new=frozenset(new))

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(len(self)))


def make_step(
    index: int,
    sequences: Sequence[TokenSequence],
    segments: tuple[str, ...],
    batch: BatchTable,
    endings: bool,
    selection: SelectionTable = EVERY_TOKEN,
) -> Step:
    """One optimizer step over these sequences, in micro-batches ordered by length; `endings` as for
    `make_batch`. Of what `selection` asks the choice was made already, unless a model is asked.
    """
    taken, scored = _by_length(sequences), is_scored(selection)
    weighs = "flat" if scored else selection.position_weight
    batches = tuple(
        make_batch(group, segments, batch.pad_multiple, endings, weighs)
        for group in _groups(taken, batch)
    )
    left = selection if scored else EVERY_TOKEN
    counts = [learned_count(one, segments, left)[0] for one in taken]
    weights = [float(np.float32(one.weight)) for one in taken]
    loss_tokens = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    learned = sum(count for weight, count in zip(weights, counts, strict=True) if weight)
    return Step(index, batches, loss_tokens, sum(map(len, taken)), learned)


def validation_batches(sequences: Sequence[TokenSequence], batch: BatchTable) -> list[Batch]:
    """Every sequence once, in micro-batches ordered by length, all three segments supervised."""
    return [
        make_batch(group, ALL_SEGMENTS, batch.pad_multiple)
        for group in _groups(_by_length(sequences), batch)
    ]


def share_of(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """Every `size`-th micro-batch from `rank` on, and one without weight where others have one
    more: all ranks run equally many.
    """
    taken = list(batches[rank::size])
    if len(taken) * size < len(batches):
        taken.append(replace(batches[0], weight=np.zeros_like(batches[0].weight)))
    return taken


def make_batch(
    sequences: Sequence[TokenSequence],
    segments: tuple[str, ...],
    pad_multiple: int = 1,
    endings: bool = False,
    position_weight: str = "flat",
) -> Batch:
    """Pad sequences to one `[B, T]` and shift: target `tokens[b, t]` is predicted at position `b*T
    + t - 1`.

    T and N are rounded up to `pad_multiple`, to keep shapes few. `position_weight` as in
    `[selection]`. `endings` says whether the run has
    sequences with some, whose positions then stand last. Raises `DataError` for a batch with more
    positions than 32 bits count, `ValueError` for indices that do not fit.
    """
    if not sequences:
        raise ValueError("a batch needs at least one sequence")
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    width = _round_up(int(lengths.max()), pad_multiple)
    if len(sequences) * width > np.iinfo(np.int32).max:
        raise DataError(
            f"a micro-batch of {len(sequences)} × {width:,} tokens does not fit 32-bit positions; "
            "lower batch.micro_batch_size, batch.pad_multiple or data.longest_tokens"
        )
    tokens = np.zeros((len(sequences), width), np.int32)
    carries = np.zeros((len(sequences), width), bool)
    kinds = np.zeros((len(sequences), width), np.int8)
    for row, sequence in enumerate(sequences):
        tokens[row, : lengths[row]] = sequence.tokens
        carries[row, : lengths[row]] = sequence.supervised(segments)
        kinds[row, : lengths[row]] = sequence.segments()
    places = np.flatnonzero(carries)  # row-major: b*T + t of each supervised token
    follows_a_cut = np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        follows_a_cut[row, lengths[row] - sequence.ending : lengths[row]] = True
    places = places[np.argsort(follows_a_cut.ravel()[places], kind="stable")]
    weights = np.array([sequence.weight for sequence in sequences], np.float32)[places // width]
    chosen = len(places) - int(follows_a_cut.sum())
    weights[:chosen] *= place_weights(position_weight, places[:chosen] // width)
    _check(tokens, places, width)
    return Batch(
        tokens=tokens,
        positions=padded((places - 1).astype(np.int32), pad_multiple),
        targets=padded(tokens.ravel()[places], pad_multiple),
        segment=padded(kinds.ravel()[places], pad_multiple),
        weight=padded(weights, pad_multiple),
        lengths=lengths,
        ids=tuple(sequence.id for sequence in sequences),
        endings=np.array([one.ending for one in sequences], np.int32) if endings else None,
    )


def padded(column: np.ndarray, multiple: int) -> np.ndarray:
    """A column [N] with zeros after it, up to a multiple of so many, and not to none."""
    return np.pad(column, (0, _round_up(max(1, len(column)), multiple) - len(column)))


def _check(tokens: np.ndarray, places: np.ndarray, width: int) -> None:
    if (tokens < 0).any():
        raise ValueError(f"a token id is negative: {int(tokens.min())}")
    if (places % width == 0).any():
        raise ValueError("the first token of a sequence carries loss, but nothing precedes it")


def _by_length(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    return sorted(sequences, key=len)


def _groups(
    sequences: Sequence[TokenSequence], batch: BatchTable
) -> Iterator[Sequence[TokenSequence]]:
    size = batch.micro_batch_size
    return (sequences[start : start + size] for start in range(0, len(sequences), size))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
