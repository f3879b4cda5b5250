"""The divergences on MLX, met block by block of the vocabulary.

In: what both softmaxes keep of a block, and its scaled logits. Out: the divergence [C, 1], and the
gradient of each block. A divergence is a pair of f and g = ∂f/∂u for every id, as
`mlx_distill/divergences.py` defines them: Σ f is its value and g - s Σ g its gradient. `Pointwise`
sums any pair. Forward and reverse KL, and what is made of both, are linear in the logits, so they
need no pass over what was kept: that halves the memory of a large vocabulary (benchmarks/README.md,
"pairs alone"). Axes: `C` positions per chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import mlx.core as mx

from mlx_distill.backends.mlx.vocabulary import Softmax, after, blend, row_dot, row_sum
from mlx_distill.objective import Objective

TINY = 1.1754944e-38  # smallest normal float32
FORBIDDEN, FAR = -1e6, 1e9  # logits below come of -inf; what stands for a difference from them

Pair = tuple[mx.array, mx.array]


# The definitions' pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v and their
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


PAIRS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}


class Divergence(Protocol):
    """How a divergence is summed over the blocks of the vocabulary."""

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        """Take a block whose scaled logits u and v [C, block] were the last that both softmaxes met;
        returns what must be computed before the next block.
        """

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        """The divergence [C, 1], once all blocks were added and both softmaxes are closed."""

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        """weight [C, 1] times its gradient with respect to a block's logits, plus ce_weight [C, 1]
        times the student's probabilities.
        """


def divergence_of(objective: Objective) -> Divergence:
    """The objective's divergence, with nothing added yet; `dkd` is none of them."""
    if linear := LINEAR.get(objective.divergence):
        return linear()
    if mixed := MIXED.get(objective.divergence):
        return mixed(objective.parameter)
    if objective.divergence == "log_tvd":
        return LogTVD()
    return Pointwise(PAIRS[objective.divergence], objective.parameter)


class Pointwise:
    """Any pair. It wants normalised probabilities, so `close` passes once more over what was kept,
    and keeps g.
    """

    def __init__(self, pair: Callable, parameter: float) -> None:
        self.terms, self.parameter = _terms_of(pair), mx.array(parameter)
        self.kept: list[tuple[mx.array, ...]] = []

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student.kept[-1], teacher.kept[-1], u, v))
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
        return blend(probability, ce_weight - weight * self.total, g, weight)


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

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student.kept[-1], teacher.kept[-1]))
        self.sums.append(row_dot(teacher.kept[-1], v - u))
        return [self.sums[-1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        self.student_scales, self.teacher_scales = student.scales, teacher.scales
        return teacher.mean(self.sums) + student.log_ratio(teacher)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, teacher = self.kept[block]
        a = (weight + ce_weight) * self.student_scales[block]
        return blend(student, a, teacher, -weight * self.teacher_scales[block])


class ReverseKL:
    """Σ s (log s - log t) = Σ s (u - v) - log Z_s + log Z_t; gradient s (log s/t - KL). Linear too."""

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []
        self.sums: list[mx.array] = []

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student.kept[-1], u - v))
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


class MixedKL:
    """Both of them, forward KL by its weight w and reverse KL by the rest. Its gradient is w (s - t) +
    (1 - w) s (d - m) with d = log s/t and its mean m; three arrays are kept.
    """

    def __init__(self, weight: float) -> None:
        self.weight = mx.array(weight)
        self.kept: list[tuple[mx.array, mx.array, mx.array]] = []
        self.forward: list[mx.array] = []
        self.reverse: list[mx.array] = []

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        s, t, difference = student.kept[-1], teacher.kept[-1], u - v
        self.kept.append((s, t, difference))
        self.forward.append(row_dot(t, difference))
        self.reverse.append(row_dot(s, difference))
        return [difference, self.forward[-1], self.reverse[-1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        self.student_scales, self.teacher_scales = student.scales, teacher.scales
        self.mean_difference = student.mean(self.reverse)
        shift = student.log_ratio(teacher)
        forward, reverse = shift - teacher.mean(self.forward), self.mean_difference - shift
        return self.weight * forward + (1 - self.weight) * reverse

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        forward, scale = self.weight * weight, self.student_scales[block]
        return _mixed(
            *self.kept[block],
            self.mean_difference,
            (weight - forward) * scale,
            (forward + ce_weight) * scale,
            forward * self.teacher_scales[block],
        )


class EntropyKL(MixedKL):
    """The same, where the weight is H / (H + half) of the teacher's entropy H."""

    def __init__(self, half: float) -> None:
        super().__init__(0.0)
        self.half = half
        self.products: list[mx.array] = []

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        self.products.append(teacher.product(v))
        return [*super().add(student, teacher, u, v), self.products[-1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        entropy = teacher.entropy(self.products)
        self.weight = entropy / (entropy + self.half)
        return super().close(student, teacher)


class LogTVD:
    """½ Σ |log s - log t|, of which the difference of the logits is kept, FAR where one of the two is
    forbidden; gradient ½ (sign(log s/t) - s Σ sign).
    """

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []

    def add(self, student: Softmax, teacher: Softmax, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student.kept[-1], _difference(u, v)))
        return [self.kept[-1][1]]

    def close(self, student: Softmax, teacher: Softmax) -> mx.array:
        self.scales, self.shift = student.scales, student.log_ratio(teacher)
        sizes: list[mx.array] = []
        signs: list[mx.array] = []
        for _, difference in self.kept:
            size, sign = _size_and_sign(after(difference, sizes[-1:] + signs[-1:]), self.shift)
            sizes.append(row_sum(size))
            signs.append(row_sum(sign))
        self.total = sum(signs)
        return 0.5 * sum(sizes)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, difference = self.kept[block]
        half = 0.5 * weight
        among = (ce_weight - half * self.total) * self.scales[block]
        return blend(student, among, _size_and_sign(difference, self.shift)[1], half)


LINEAR: dict[str, Callable[[], Divergence]] = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL}
MIXED: dict[str, Callable[[float], Divergence]] = {"mixed_kl": MixedKL, "entropy_kl": EntropyKL}


@mx.compile
def _difference(u: mx.array, v: mx.array) -> mx.array:
    return mx.where(mx.minimum(u, v) < FORBIDDEN, FAR, u - v)


@mx.compile
def _size_and_sign(difference: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
    """|log s/t| and its sign; 0 where the difference is FAR."""
    ratio = mx.where(difference == FAR, 0.0, difference - shift)
    return mx.abs(ratio), mx.sign(ratio)


@mx.compile
def _mixed(
    s: mx.array,
    t: mx.array,
    difference: mx.array,
    mean: mx.array,
    a: mx.array,
    b: mx.array,
    c: mx.array,
) -> mx.array:
    return s * ((difference - mean) * a + b) - t * c


@mx.compile
def _advantage(
    s: mx.array, difference: mx.array, mean: mx.array, a: mx.array, b: mx.array
) -> mx.array:
    return s * ((difference - mean) * a + b)
