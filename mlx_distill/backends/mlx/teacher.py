"""The teacher: a frozen model and its answers, live or for a cache on disk.

In: batches. Out: hidden states at the loss positions beside the head, which the student's loss
takes; for a cache what is left of the distributions over the vocabulary, made of a few positions at
a time: [N, V] is never made.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distill.backends.failures import explained
from mlx_distill.backends.mlx.generate import MlxModel
from mlx_distill.backends.mlx.heads import FLOOR, Head, MatrixHead, QuantizedHead
from mlx_distill.backends.mlx.matching import Watched
from mlx_distill.backends.mlx.model import SplitModel
from mlx_distill.data.batches import Batch

TEACHER_CHUNK = 128  # positions whose logits exist at once while a cache is written


class LiveTargets(NamedTuple):
    """Hidden states [N, D], the head that makes logits of them, and what watched layers gave."""

    hidden: mx.array
    head: Head
    states: tuple[mx.array, ...] = ()


class MlxTeacher(MlxModel):
    """A frozen model. Its targets are hidden states [N, D] and its head: [N, V] is never made."""

    def __init__(self, split: SplitModel):
        super().__init__(split)
        self.loss_head = split.loss_head()
        self._watched: Watched | None = None

    def watch(self, layers: Sequence[int]) -> None:
        """From now on targets hold what these layers give, counted from 1."""
        self._watched = Watched(self.split, layers)

    def targets(self, batch: Batch) -> LiveTargets:
        positions = batch.positions[: batch.taught]
        hidden = self.gather(batch.tokens, positions)
        return LiveTargets(
            hidden, self.loss_head, self._watched.taken(positions) if self._watched else ()
        )

    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, log_probs, tail = self._by_chunk(batch, rows, partial(_top_k, k=k))
        return ids, log_probs, tail

    def draw(
        self, batch: Batch, uniform: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, entropy, top = self._by_chunk(batch, rows, _draw, mx.array(uniform))
        return ids, entropy, top

    def states(self, batch: Batch) -> np.ndarray:
        with explained("the teacher's forward pass"):
            return to_bits(self.targets(batch).hidden)

    def head_matrix(self) -> np.ndarray | None:
        head = self.loss_head
        if (
            not isinstance(head, MatrixHead | QuantizedHead)
            or head.bias is not None
            or head.finish is not None
        ):
            return None
        if isinstance(head, MatrixHead):
            return to_bits(head.weight)
        sizes = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
        return to_bits(mx.dequantize(head.weight, head.scales, head.biases, **sizes))

    def _by_chunk(
        self, batch: Batch, rows: int, answer: Callable, *inputs: mx.array
    ) -> tuple[np.ndarray, ...]:
        """`answer(log-probabilities [C, rows], inputs [C, …])` of all N positions, by chunks of
        them.
        """
        hidden, head, _ = self.targets(batch)
        columns = []
        for start in range(0, len(hidden), TEACHER_CHUNK):
            place = slice(start, start + TEACHER_CHUNK)
            logits = head.logits(hidden[place].astype(mx.float32), 0, rows)
            below = logits - logits.max(
                axis=1, keepdims=True
            )  # so that a log-probability near 0 keeps its digits
            with explained("the teacher's forward pass"):
                found = answer(
                    below - mx.logsumexp(below, axis=1, keepdims=True),
                    *(array[place] for array in inputs),
                )
                columns.append([np.array(column) for column in found])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def _top_k(log_probs: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """Ids and log-probabilities [C, k], the likeliest first, and the log of what is left [C]."""
    ids = mx.argpartition(-log_probs, k - 1, axis=1)[:, :k]
    values = mx.take_along_axis(log_probs, ids, axis=1)
    order = mx.argsort(-values, axis=1)
    ids = mx.take_along_axis(ids, order, axis=1).astype(mx.int32)
    values = mx.take_along_axis(values, order, axis=1)
    # sorting may leave any of equally likely ids in front, and the first one out
    top = mx.argmax(log_probs, axis=1, keepdims=True).astype(mx.int32)
    ids = mx.where(mx.arange(k) == 0, top, mx.where(ids == top, ids[:, :1], ids))
    if k == log_probs.shape[1]:
        tail = mx.full((len(ids),), -mx.inf)
    else:
        tail = mx.logsumexp(mx.put_along_axis(log_probs, ids, mx.array(-mx.inf), axis=1), axis=1)
    return ids, values, tail


def _draw(log_probs: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Ids [C, S] whose cumulated probability first exceeds `uniform` [C, S], entropy [C] in nats,
    most likely id [C].
    """
    probs, (count, vocab) = mx.exp(log_probs), log_probs.shape
    # sums of sums: a GPU has no float64, and a float32 running sum over a vocabulary loses
    # digits
    size = math.isqrt(vocab) + 1
    blocks = mx.pad(probs, [(0, 0), (0, -vocab % size)]).reshape(count, -1, size)
    sums = mx.cumsum(blocks.sum(axis=2), axis=1)
    cumulated = (mx.cumsum(blocks, axis=2) + (sums - blocks.sum(axis=2))[..., None]).reshape(
        count, -1
    )
    wanted = uniform * sums[:, -1:]
    low, high = mx.zeros(uniform.shape, mx.int32), mx.full(uniform.shape, vocab - 1)
    for _ in range(vocab.bit_length()):
        middle = (low + high) // 2
        before = mx.take_along_axis(cumulated, middle, axis=1) <= wanted
        low, high = (
            mx.where(before, mx.minimum(middle + 1, high), low),
            mx.where(before, high, middle),
        )
    entropy = -(probs * mx.maximum(log_probs, FLOOR)).sum(axis=1)
    return low, entropy, mx.argmax(log_probs, axis=1).astype(mx.int32)


def to_bits(array: mx.array) -> np.ndarray:
    """bfloat16 as uint16 bits, anything else as float32."""
    return np.array(
        array.view(mx.uint16) if array.dtype == mx.bfloat16 else array.astype(mx.float32)
    )


def from_bits(array: np.ndarray) -> mx.array:
    """float32 as it is; uint16 holds the bits of bfloat16."""
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)
