"""The vocabulary, met block by block on MLX: a softmax, the logits of some ids, the most likely id.

In: logits [C, block] of one block after the other. Out: columns [C, 1] that are known once the last
block was added, and the exponentials that were kept of each. Decided here: where the vocabulary is
cut, and how a CPU takes exponentials and sums. Blocks are ordered by `after`: a lazy graph would
otherwise hold all of them at once. Axes: `C` positions per chunk, `V` vocabulary, `K` some ids.
"""

from itertools import pairwise

import mlx.core as mx

from mlx_distill.backends.chunks import MLX_BLOCK_ELEMENTS as BLOCK_ELEMENTS
from mlx_distill.backends.chunks import MLX_WIDEST_BLOCK as WIDEST_BLOCK
from mlx_distill.backends.chunks import vocabulary_blocks
from mlx_distill.backends.mlx.heads import FLOOR

Blocks = list[tuple[int, int]]  # of each block the first id and the one after its last


def blocks_of(vocab: int, rows: int, splits: bool) -> Blocks:
    """The blocks of the vocabulary, as equal as they come."""
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    limits = BLOCK_ELEMENTS[device], WIDEST_BLOCK.get(device, 0)
    count = vocabulary_blocks(vocab, rows, *limits) if splits else 1
    edges = [vocab * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def after(x: mx.array, dependencies: list[mx.array]) -> mx.array:
    """x, but only once the dependencies are computed."""
    return mx.depends([x], dependencies)[0] if dependencies else x


class Softmax:
    """One softmax of a chunk, met block by block: `kept` exponentials are shifted by their block's
    own maximum.
    """

    def __init__(self) -> None:
        self.kept: list[mx.array] = []  # [C, block] each
        self.tops: list[mx.array] = []  # [C, 1] each
        self.sums: list[mx.array] = []

    def add(self, scaled: mx.array, top: mx.array) -> list[mx.array]:
        self.kept.append(_exp_below(scaled, top))
        self.tops.append(top)
        self.sums.append(row_sum(self.kept[-1]))
        return [self.kept[-1], self.sums[-1]]

    def close(self) -> None:
        """Set `top` and `log_sum` [C, 1] (log Z is their sum) and `scales`, which make `kept`
        probabilities.
        """
        tops, sums = mx.concatenate(self.tops, axis=1), mx.concatenate(self.sums, axis=1)
        self.top = tops.max(axis=1, keepdims=True)
        shifts = mx.exp(tops - self.top)
        total = (shifts * sums).sum(axis=1, keepdims=True)
        self.log_sum = mx.log(total)
        self.scales = mx.split(shifts / total, len(self.tops), axis=1)

    def mean(self, partial_sums: list[mx.array]) -> mx.array:
        """Σ probability * x [C, 1] from each block's Σ kept * x."""
        return sum(
            scale * partial for scale, partial in zip(self.scales, partial_sums, strict=True)
        )

    def product(self, scaled: mx.array) -> mx.array:
        """Of the block that was added last, what `entropy` needs: Σ kept (scaled - top), [C, 1]."""
        return row_dot(self.kept[-1], scaled - self.tops[-1])

    def entropy(self, products: list[mx.array]) -> mx.array:
        """[C, 1] in nats from each block's `product`: log Σ exp(x) - Σ p x, of logits x that are
        taken from their largest one, hence exact where one id has nearly all.
        """
        blocks = zip(products, self.tops, self.sums, strict=True)
        return self.log_sum - self.mean(
            [product + (top - self.top) * total for product, top, total in blocks]
        )

    def log_ratio(self, other: "Softmax") -> mx.array:
        """log Z / log Z of the other, [C, 1]."""
        return (self.top - other.top) + (self.log_sum - other.log_sum)

    def minus_log(self, logit: mx.array) -> mx.array:
        """-log of the probability of an id with this logit [C, 1]."""
        return self.log_sum - (logit - self.top)


class Picked:
    """The logits [C, K] of some ids, met block by block; an id below 0 is none."""

    def __init__(self, ids: mx.array) -> None:
        self.ids, self.logits = ids, mx.full(ids.shape, FLOOR)

    def add(self, logits: mx.array, start: int) -> list[mx.array]:
        here, columns = _place(self.ids, start, logits.shape[1])
        self.logits = mx.where(here, mx.take_along_axis(logits, columns, axis=1), self.logits)
        return [self.logits]


class MostLikely:
    """The first most likely id of each row, met block by block."""

    def __init__(self) -> None:
        self.best: list[mx.array] = []  # its logit and itself, [C, 1] each

    def add(self, logits: mx.array, start: int) -> mx.array:
        """The block's maxima [C, 1]."""
        place = mx.argmax(logits, axis=1, keepdims=True)
        found = [mx.take_along_axis(logits, place, axis=1), place.astype(mx.int32) + start]
        better = found[0] > self.best[0] if self.best else None
        self.best = (
            [mx.where(better, new, old) for new, old in zip(found, self.best, strict=True)]
            if self.best
            else found
        )
        return found[0]

    @property
    def id(self) -> mx.array:
        return self.best[1]


def _place(ids: mx.array, start: int, size: int) -> tuple[mx.array, mx.array]:
    """Which ids lie in a block, and their columns in it; 0 or the last one for those that do not."""
    return (ids >= start) & (ids < start + size), mx.clip(ids - start, 0, size - 1)


def add_at(x: mx.array, ids: mx.array, start: int, amount: mx.array | float) -> mx.array:
    """A block x [C, size] with `amount` [C, K] added at those ids [C, K] that lie in it."""
    here, columns = _place(ids, start, x.shape[1])
    return x.at[mx.arange(len(x))[:, None], columns].add(mx.where(here, amount, 0))


def floor(logits: mx.array) -> mx.array:
    return mx.maximum(logits, FLOOR)


def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    """exp(x - top) for x <= top."""
    return (
        _polynomial_exp(x, top)
        if mx.default_device().type == mx.DeviceType.cpu
        else mx.exp(x - top)
    )


@mx.compile
def _polynomial_exp(x: mx.array, top: mx.array) -> mx.array:
    """exp(x - top) for x <= top, at least 1e-38, to one unit in the last place: 2^n exp(r), |r| <=
    log(2) / 2.

    MLX's own exp is scalar on x86 (12 ns an element; this one takes 1.5 compiled, 4 otherwise) and
    off by up to 14 units. The constants that split log(2) are Cephes' (expf); r is short enough for
    its Taylor polynomial.
    """
    x = mx.maximum(x - top, -87.0)
    n = (x * 1.4426950408889634 - 0.5).astype(mx.int32)  # truncates toward zero, hence rounds
    whole = n.astype(mx.float32)
    r = (x - whole * 0.693359375) + whole * 2.12194440e-4
    y = r * (1 / 5040) + 1 / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        y = y * r + coefficient
    return y * mx.left_shift(n + 127, 23).view(mx.float32)


@mx.compile
def blend(x: mx.array, a: mx.array, y: mx.array, b: mx.array) -> mx.array:
    """x a + y b"""
    return x * a + y * b


def row_sum(x: mx.array) -> mx.array:
    """[C, 1]; on a CPU through BLAS, whose blocked sums are five times faster and closer."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return x @ mx.ones((x.shape[1], 1)) if on_cpu else x.sum(axis=1, keepdims=True)


def row_dot(x: mx.array, y: mx.array) -> mx.array:
    """[C, 1]"""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return (x[:, None] @ y[:, :, None])[:, 0] if on_cpu else (x * y).sum(axis=1, keepdims=True)
