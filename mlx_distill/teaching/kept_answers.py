"""A live teacher that is asked about each sequence once: its hidden states stay in memory.

In: a teacher and all sequences that a run asks it about. Out: targets, as the teacher itself gives
them. Decided here: it is asked about a group of sequences of about one length when the first of
them is needed. Groups are a function of the sequences alone, so a run that is continued hears the
same again, to the last digit. How much memory that takes is `cost/kept_answers.py`'s.
"""

from collections.abc import Iterable

import numpy as np

from mlx_distill.backends.protocol import Backend, LiveTeacher, Targets
from mlx_distill.data.batches import Batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.recipe.training_tables import BatchTable
from mlx_distill.teaching.fill import whole_batch


class KeptAnswers:
    """The `Teacher` of the sequences that it is given; any other is asked about each time."""

    def __init__(
        self,
        teacher: LiveTeacher,
        backend: Backend,
        sequences: Iterable[TokenSequence],
        batch: BatchTable,
    ):
        self.teacher, self.backend, self.batch = teacher, backend, batch
        self.vocabulary_rows = teacher.vocabulary_rows
        ordered = sorted(sequences, key=lambda sequence: (len(sequence), sequence.id))
        self._tokens = {sequence.id: sequence.tokens for sequence in ordered}
        size = batch.micro_batch_size
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        self._groups = {sequence.id: group for group in groups for sequence in group}
        self._states: dict[str, np.ndarray] = {}  # id → [T, D]

    def targets(self, batch: Batch) -> Targets:
        """At the first `batch.taught` positions."""
        if not all(self._is_known(batch, row) for row in range(len(batch.ids))):
            return self.teacher.targets(batch)
        positions = batch.positions[: batch.taught].astype(np.int64)
        row_of, places = np.divmod(positions, batch.tokens.shape[1])
        kept = [self._of(name) for name in batch.ids]
        states = np.empty((len(positions), kept[0].shape[1]), kept[0].dtype)
        for row, some in enumerate(kept):
            where = np.flatnonzero(row_of == row)
            states[where] = some[places[where]]
        return self.backend.cached_targets(states, self.teacher.loss_head)

    def _is_known(self, batch: Batch, row: int) -> bool:
        """Whether a row is the sequence of its id, or the start of it."""
        tokens = batch.tokens[row, : batch.lengths[row]]
        kept = self._tokens.get(batch.ids[row], tokens[:0])
        return np.array_equal(kept[: len(tokens)], tokens)

    def _of(self, name: str) -> np.ndarray:
        if name not in self._states:
            self._ask(self._groups[name])
        return self._states[name]

    def _ask(self, group: list[TokenSequence]) -> None:
        states = self.teacher.states(whole_batch(group, self.batch.pad_multiple))
        ends = np.cumsum([len(sequence) for sequence in group])[:-1]
        for sequence, some in zip(group, np.split(states, ends), strict=True):
            self._states[sequence.id] = some
