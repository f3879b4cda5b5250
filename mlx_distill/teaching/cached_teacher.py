"""A teacher whose outputs come from disk.

In: a `TeacherCache` and a batch. Out: the targets at the batch's positions, as a live teacher gives
them, without the teacher's weights. Decided here: each row of the batch, without what follows a cut, must be
the start of a kept sequence of its example.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from mlx_distill.backends.protocol import Backend, SparseTargets, Targets, check_indices
from mlx_distill.data.batches import Batch, make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import CacheError
from mlx_distill.teaching.folder import TeacherCache
from mlx_distill.teaching.kinds import KINDS, RowPositions
from mlx_distill.teaching.parts import Record


class CachedTeacher:
    """The `Teacher` whose outputs lie in a cache."""

    def __init__(self, cache: TeacherCache, backend: Backend):
        self.cache, self.backend = cache, backend
        self.vocabulary_rows = cache.fields.vocabulary_rows

    def targets(self, batch: Batch) -> Targets:
        """At the first `batch.taught` positions; None where that is none. Raises `CacheError`, which
        names the example, where a row is not the start of a kept sequence.
        """
        check_indices("loss positions", batch.positions, batch.tokens.size)
        positions = batch.positions[: batch.taught].astype(np.int64)
        if not len(positions):
            return None
        row_of, places = np.divmod(positions, batch.tokens.shape[1])
        rows = []
        for row in np.unique(row_of):
            where = np.flatnonzero(row_of == row)
            rows.append(RowPositions(self._record(batch, row), where, places[where]))
        fields = self.cache.fields
        found = KINDS[fields.kind].read(rows, len(positions), fields)
        if isinstance(found, SparseTargets):
            return found
        return self.backend.cached_targets(found, self.head)

    def refuse_other_rows(self, rows: int) -> None:
        """Raises `CacheError` where student and teacher compare other rows of their heads than were
        kept.
        """
        if self.cache.fields.kind != "hidden" and rows != self.vocabulary_rows:
            raise CacheError(
                f"{self.cache.path}: vocabulary_rows {rows} asked, {self.vocabulary_rows} found"
            )

    def refuse_unknown_targets(
        self, sequences: Iterable[TokenSequence], segments: tuple[str, ...]
    ) -> None:
        """Raises `CacheError`, which names the example, where a learned token is none of the ids
        that are kept: before training, for `dkd` asks about it.
        """
        for sequence in sequences:
            batch = make_batch([sequence], segments, endings=True)
            targets = self.targets(batch)
            if isinstance(targets, SparseTargets):
                targets.refuse_unknown_targets(batch)

    def _record(self, batch: Batch, row: int) -> Record:
        ending = 0 if batch.endings is None else batch.endings[row]
        tokens = batch.tokens[row, : batch.lengths[row] - ending]
        record = self.cache.find(batch.ids[row], tokens)
        if record is None:
            raise CacheError(
                f"{self.cache.path}: example {batch.ids[row]!r}: its {len(tokens)} tokens are not "
                "the start of a sequence that is kept under this id: run `mlx-distill teach` with "
                "this recipe"
            )
        return record

    @cached_property
    def head(self) -> Any:
        """The teacher's head, as the backend holds it (hidden)."""
        return self.backend.cached_head(np.array(self.cache.head))
