"""What a teacher cache keeps for each token, in three kinds.

In: a teacher and a batch that asks for every token (`ask`), or where the outputs for a batch lie
(`read`). Out: named arrays [N, …] to keep, or the targets at N positions. Decided here: what each
kind keeps and in which number format. Outputs are at temperature 1, and those at token t
follow tokens[: t + 1]. Axes: `N` tokens or loss positions, `K` kept ids, `S` draws, `D` width.
"""

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from mlx_distill.backends.protocol import LiveTeacher, SparseTargets
from mlx_distill.data.batches import Batch
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.parts import Record

WIDTH_MULTIPLE = 8  # drawn ids are padded to it, which keeps shapes few


class RowPositions(NamedTuple):
    """The positions of a batch that lie in one of its rows."""

    record: Record  # of that row's sequence
    where: np.ndarray  # which of the N positions they are
    places: np.ndarray  # at which tokens of the sequence they lie

    def take(self, name: str) -> np.ndarray:
        """What an array of the part has at these tokens."""
        first, last = int(self.places.min()), int(self.places.max())
        start = self.record.start
        rows = self.record.part.rows(name, start + first, start + last + 1)
        return rows[self.places - first]


class Kind(Protocol):
    """What a cache's kind can do; it has no state."""

    @staticmethod
    def ask(teacher: LiveTeacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        """What the teacher says at the positions of a batch, as named arrays to keep."""

    @staticmethod
    def read(
        rows: list[RowPositions], count: int, fields: CacheFields
    ) -> SparseTargets | np.ndarray:
        """The targets at `count` positions, or the hidden states [N, D] that make them."""


class TopK:
    """`ids` uint32 [N, K], the likeliest first, `log_probs` float16 [N, K], `tail` float32 [N]: the
    log of all others' mass.
    """

    @staticmethod
    def ask(teacher: LiveTeacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        ids, log_probs, tail = teacher.top_k(batch, fields.top_k, fields.vocabulary_rows)
        return {
            "ids": ids.astype(np.uint32),
            "log_probs": log_probs.astype(fields.dtype),
            "tail": tail,
        }

    @staticmethod
    def read(rows: list[RowPositions], count: int, fields: CacheFields) -> SparseTargets:
        ids = np.empty((count, fields.top_k), np.int32)
        log_probs = np.empty((count, fields.top_k), np.float32)
        tail = np.empty(count, np.float32)
        for row in rows:
            ids[row.where] = row.take("ids")
            log_probs[row.where] = row.take("log_probs")
            tail[row.where] = row.take("tail")
        offset = np.zeros(count, np.float32)
        return SparseTargets(ids, log_probs, tail, offset, top=ids[:, 0].copy())


class Sampled:
    """Draws with replacement from the teacher's distribution: Sparse Logit Sampling (arXiv
    2503.16870) at proposal temperature 1.

    `distinct` uint16 [N]: how many different ids a token's S draws hold; `ids` uint32 and `counts`
    uint16: those ids and how often each was drawn, of all tokens one after another; `entropy`
    float32 [N] of the teacher and `top` uint32 [N], its likeliest id. counts / S is an unbiased
    estimate of the teacher's distribution, so loss (with the exact entropy) and gradient of forward
    KL are unbiased. The draws are stratified, one from each S-th of the cumulated distribution: as
    unbiased as independent ones, with less variance.
    """

    @staticmethod
    def ask(teacher: LiveTeacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        rows = zip(batch.ids, batch.lengths, strict=True)
        uniform = np.concatenate([stratified(example, length, fields) for example, length in rows])
        drawn, entropy, top = teacher.draw(batch, uniform, fields.vocabulary_rows)
        drawn = np.sort(drawn, axis=1)
        first = np.ones(drawn.shape, bool)  # of the equal draws of a token
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = np.diff(np.append(np.flatnonzero(first), drawn.size))
        return {
            "distinct": first.sum(1).astype(np.uint16),
            "ids": drawn[first].astype(np.uint32),
            "counts": counts.astype(np.uint16),
            "entropy": entropy,
            "top": top.astype(np.uint32),
        }

    @staticmethod
    def read(rows: list[RowPositions], count: int, fields: CacheFields) -> SparseTargets:
        most = max(int(row.take("distinct").max()) for row in rows)
        width = -(-most // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        ids = np.empty((count, width), np.int32)  # -1 where a token has fewer
        counts = np.empty((count, width), np.float32)
        entropy = np.empty(count, np.float32)
        top = np.empty(count, np.int32)
        for row in rows:
            ids[row.where], counts[row.where] = _drawn(row, width)
            entropy[row.where] = row.take("entropy")
            top[row.where] = row.take("top")
        share = counts / fields.samples
        with np.errstate(divide="ignore"):
            log_share = np.log(share)
        # A divergence from the shares contains their entropy; the teacher's own takes its place.
        offset = -(share * np.where(share > 0, log_share, 0)).sum(1) - entropy
        nothing_else = np.full(count, -np.inf, np.float32)
        return SparseTargets(ids, log_share, nothing_else, offset.astype(np.float32), top)


class Hidden:
    """`states` [N, D] as the backend computes them: float32, or bfloat16 as uint16 bits. The head
    is kept once.
    """

    @staticmethod
    def ask(teacher: LiveTeacher, batch: Batch, fields: CacheFields) -> dict[str, np.ndarray]:
        return {"states": teacher.states(batch)}

    @staticmethod
    def read(rows: list[RowPositions], count: int, fields: CacheFields) -> np.ndarray:
        states = [row.take("states") for row in rows]
        if len({some.dtype for some in states}) > 1:  # parts that two backends wrote
            states = [from_bits(some) if some.dtype == np.uint16 else some for some in states]
        at_all = np.empty((count, states[0].shape[1]), states[0].dtype)
        for row, some in zip(rows, states, strict=True):
            at_all[row.where] = some
        return at_all


KINDS: dict[str, type[Kind]] = {"top_k": TopK, "sampled": Sampled, "hidden": Hidden}


def _drawn(row: RowPositions, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The different ids that were drawn for some tokens of a sequence, and how often each was:
    [n, width], padded with -1 and 0.
    """
    record = row.record
    distinct = record.part.rows("distinct", record.start, record.stop).astype(np.int64)
    first = np.cumsum(distinct) - distinct  # of each token, among the draws of the sequence
    columns = np.arange(width)
    known = columns < distinct[row.places, None]
    draws = np.where(known, first[row.places, None] + columns, 0)
    of_record = record.first_draw, record.first_draw + int(distinct.sum())
    ids = record.part.rows("ids", *of_record)[draws].astype(np.int64)
    counts = record.part.rows("counts", *of_record)[draws]
    return np.where(known, ids, -1), np.where(known, counts, 0)


def stratified(example: str, length: int, fields: CacheFields) -> np.ndarray:
    """float32 [T, S] in [0, 1), one in each S-th; a longer sequence of the same id has the same
    ones at the start.
    """
    digest = int.from_bytes(hashlib.sha256(example.encode()).digest()[:8], "little")
    random = np.random.default_rng([fields.seed, digest]).random((length, fields.samples))
    uniform = ((np.arange(fields.samples) + random) / fields.samples).astype(np.float32)
    return np.minimum(uniform, np.nextafter(np.float32(1), np.float32(0)))


def from_bits(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
