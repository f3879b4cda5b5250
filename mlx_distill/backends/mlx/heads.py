"""What the loss reads logits from on MLX: a frozen head, or what a cache kept of a teacher.

In: hidden states of some positions and a range of ids. Out: float32 logits of that range, whatever
form the head is stored in. Axes: `N` loss positions, `C` positions per chunk, `V` vocabulary, `D`
width, `K` kept teacher tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

# replaces logits of -inf, whose differences are NaN; its probability is 0 and 0 * FLOOR is 0
FLOOR = -1e9

Finish = Callable[[mx.array], mx.array]


class Head(Protocol):
    """A frozen projection to the vocabulary. `splits`: whether a range of ids costs only its share
    of the whole.
    """

    @property
    def splits(self) -> bool: ...

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        """float32 logits [C, stop - start] of the ids `start:stop` from float32 hidden states [C,
        D].
        """


@dataclass(frozen=True)
class MatrixHead:
    """`finish(hidden @ weight.T + bias)`, weight [V, D] in any float type; finish is elementwise
    (cap, scale).
    """

    weight: mx.array
    bias: mx.array | None = None
    finish: Finish | None = None
    splits: bool = True

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        logits = hidden @ self.weight[start:stop].astype(mx.float32).T
        return _finish(logits, self.bias, self.finish, start, stop)


@dataclass(frozen=True)
class QuantizedHead:
    """The same with `mx.quantize`d weights: `finish(quantized_matmul(hidden, ...) + bias)`."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"
    bias: mx.array | None = None
    finish: Finish | None = None
    splits: bool = True

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        logits = mx.quantized_matmul(
            hidden,
            self.weight[start:stop],
            self.scales[start:stop],
            None if self.biases is None else self.biases[start:stop],
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return _finish(logits, self.bias, self.finish, start, stop)


@dataclass(frozen=True)
class CallableHead:
    """Any function from hidden states [C, D] to logits [C, V or more]; the vocabulary is not cut
    into blocks.
    """

    function: Callable[[mx.array], mx.array]
    splits: bool = False

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        return self.function(hidden)[:, start:stop].astype(mx.float32)


def _finish(
    logits: mx.array, bias: mx.array | None, finish: Finish | None, start: int, stop: int
) -> mx.array:
    logits = logits if bias is None else logits + bias[start:stop].astype(mx.float32)
    return (logits if finish is None else finish(logits)).astype(mx.float32)


class SparseHead(NamedTuple):
    """`SparseTargets` as arrays: what takes the place of the teacher's head where only K of its
    answers [N, K] are known.
    """

    ids: mx.array
    log_probs: mx.array
    tail: mx.array
    offset: mx.array
    top: mx.array
