"""The divergences on MLX, met block by block of the vocabulary.

In: what both softmaxes keep of a block, and its scaled logits. Out: the divergence [C, 1], and the
gradient of each block. A divergence is a pair of f and g = ∂f/∂u for every id, as `objective.py`
defines them: Σ f is its value and g - s Σ g its gradient. `Pointwise` sums any pair. Forward and
reverse KL are linear in the logits, so they need no pass over what was kept: that halves the memory
of a large vocabulary (benchmarks/README.md, "pairs alone"). Axes: `C` positions per chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import mlx.core as mx

from mlx_distill.backends.mlx.vocabulary import Softmax, after, row_dot, row_sum
from mlx_distill.objective import Objective

TINY = 1.1754944e-38  # smallest normal float32

Pair = tuple[mx.array, mx.array]


# `objective.py`'s pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v and their
# exponentials s and t. What is a multiple of s may be left out of g: g - s Σ g is the same without
# it.


def forward_kl(u: mx.array, v: mx.array, s: mx.array, t: mx.array, parameter: mx.array) -> Pair:
    return t * (v - u), -t


def reverse_kl(u: mx.array, v: mx.array, s: mx.array, t: mx.array, parameter: mx.array) -> Pair:
    return s * (u - v), s * (u - v)


def jsd(u: mx.array, v: mx.array, s: mx.array, t: mx.array, beta: mx.array) -> Pair:
    m = mx.maximum((1 - beta) * s + beta * t, TINY)
    student = (1 - beta) * (s * mx.log(mx.maximum(s, TINY) / m))
    teacher = beta * (t * mx.log(mx.maximum(t, TINY) / m))
    return student + teacher, student


def skew_kl(u: mx.array, v: mx.array, s: mx.array, t: mx.array, alpha: mx.array) -> Pair:
    ratio = mx.maximum(t, TINY) / mx.maximum((1 - alpha) * s + alpha * t, TINY)
    return t * mx.log(ratio), (alpha - 1) * s * ratio


def skew_reverse_kl(u: mx.array, v: mx.array, s: mx.array, t: mx.array, alpha: mx.array) -> Pair:
    ratio = mx.maximum(s, TINY) / mx.maximum((1 - alpha) * t + alpha * s, TINY)
    return s * mx.log(ratio), s * (mx.log(ratio) - alpha * ratio)


def tvd(u: mx.array, v: mx.array, s: mx.array, t: mx.array, parameter: mx.array) -> Pair:
    return 0.5 * mx.abs(s - t), 0.5 * s * mx.sign(s - t)


def mixed_kl(u: mx.array, v: mx.array, s: mx.array, t: mx.array, weight: mx.array) -> Pair:
    reverse = (1 - weight) * s * (u - v)
    return reverse + weight * t * (v - u), reverse - weight * t


PAIRS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "mixed_kl": mixed_kl,
}


class Divergence(Protocol):
    """How a divergence is summed over the blocks of the vocabulary."""

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        """Take what both softmaxes keep of a block [C, block] and its scaled logits u and v; returns
        what must be computed before the next block.
        """

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        """The divergence [C, 1], once all blocks were added and both softmaxes are closed."""

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        """weight [C, 1] times its gradient with respect to a block's logits, plus ce_weight [C, 1]
        times the student's probabilities.
        """


def divergence_of(objective: Objective) -> Divergence:
    """The objective's divergence, with nothing added yet."""
    if linear := LINEAR.get(objective.divergence):
        return linear()
    return Pointwise(PAIRS[objective.divergence], objective.parameter)


class Pointwise:
    """Any pair. It wants normalised probabilities, so `close` passes once more over what was kept,
    and keeps g.
    """

    def __init__(self, pair: Callable, parameter: float) -> None:
        self.terms, self.parameter = _terms_of(pair), mx.array(parameter)
        self.kept: list[tuple[mx.array, ...]] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, teacher, u, v))
        return []

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        kept, self.kept = self.kept, []
        values, totals = [], []
        done: list[mx.array] = []
        tops = (student.top, student.log_sum, teacher.top, teacher.log_sum)
        for block, arrays in enumerate(kept):
            scales = after(student.scales[block], done), teacher.scales[block]
            probability, f, g = self.terms(*arrays, *scales, *tops, self.parameter)
            self.kept.append((probability, g))
            values.append(row_sum(f))
            totals.append(row_sum(g))
            done = [probability, g, values[-1], totals[-1]]
        self.total = sum(totals)
        return sum(values)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        probability, g = self.kept[block]
        return _blend(probability, ce_weight - weight * self.total, g, weight)


@cache
def _terms_of(pair: Callable) -> Callable:
    """(s, f, g) of what was kept, compiled into one kernel. Log-probabilities that a pair does not
    read are never computed, and their logits not held. A kernel fuses eleven operations in a row; a
    longer formula makes whole blocks in between.
    """

    @mx.compile
    def terms(
        s: mx.array,
        t: mx.array,
        u: mx.array,
        v: mx.array,
        scale: mx.array,
        teacher_scale: mx.array,
        top: mx.array,
        log_sum: mx.array,
        teacher_top: mx.array,
        teacher_log_sum: mx.array,
        parameter: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        u, v = (u - top) - log_sum, (v - teacher_top) - teacher_log_sum
        s, t = s * scale, t * teacher_scale
        return s, *pair(u, v, s, t, parameter)

    return terms


class ForwardKL:
    """Σ t (log t - log s) = Σ t (v - u) + log Z_s - log Z_t for scaled logits u, v; gradient s - t.
    Linear: one pass is enough.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []
        self.sums: list[mx.array] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, teacher))
        self.sums.append(row_dot(teacher, v - u))
        return [self.sums[-1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        self.student_scales, self.teacher_scales = student.scales, teacher.scales
        return teacher.mean(self.sums) + student.log_ratio(teacher)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, teacher = self.kept[block]
        a = (weight + ce_weight) * self.student_scales[block]
        return _blend(student, a, teacher, -weight * self.teacher_scales[block])


class ReverseKL:
    """Σ s (log s - log t) = Σ s (u - v) - log Z_s + log Z_t; gradient s (log s/t - KL). Linear too."""

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []
        self.sums: list[mx.array] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, u - v))
        self.sums.append(row_dot(*self.kept[-1]))
        return [self.kept[-1][1], self.sums[-1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        self.student_scales = student.scales
        self.mean_difference = student.mean(self.sums)
        return self.mean_difference - student.log_ratio(teacher)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, difference = self.kept[block]
        scale = self.student_scales[block]
        return _advantage(
            student, difference, self.mean_difference, weight * scale, ce_weight * scale
        )


LINEAR: dict[str, Callable[[], Divergence]] = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL}


@mx.compile
def _blend(x: mx.array, a: mx.array, y: mx.array, b: mx.array) -> mx.array:
    return x * a + y * b


@mx.compile
def _advantage(
    s: mx.array, difference: mx.array, mean: mx.array, a: mx.array, b: mx.array
) -> mx.array:
    return s * ((difference - mean) * a + b)
