"""The distillation loss on MLX, walked over chunks of positions so that [N, V] exists nowhere.

In: hidden states of student and teacher at the N loss positions, the student's head, the teacher's
`Head`, targets and weights. Out: the scalar loss, and per position the divergence, the
cross-entropy and whether both name the same token. Decided here: how the walk is cut and in which
order it runs. The naive equivalent, in float32, is

    z = student_hidden @ student_weight.T            u = log_softmax(z / T)      # [N, V]
    t = teacher_head(teacher_hidden)                 v = log_softmax(t / T)      # [N, V]
    kd = scale * divergence(u, v)                    ce = -log_softmax(z)[target]
    loss = sum(weight * (kd_weight * kd + (1 - kd_weight) * ce)) / loss_tokens

A chunk of positions passes over the vocabulary in blocks twice. The first pass computes the logits
of a block, keeps their exponentials (shifted by the block's own maximum) and the sums a row needs;
after it the normalisers are known and the second pass turns what was kept into the gradient with
respect to the logits, and that into those of the hidden states and of the head. So the gradient
multiplies with no head twice and each exponential is taken once. A divergence that is not linear in
the logits takes a pass of its own in between, over what was kept. A head in bfloat16 is promoted to
float32 block by block. Chunks and blocks are ordered by `mx.depends`: a lazy graph would otherwise
hold all of them. Axes: `N` loss positions, `C` positions per chunk, `V` vocabulary, `D` width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_distill.backends.chunks import MLX_BLOCK_ELEMENTS as BLOCK_ELEMENTS
from mlx_distill.backends.chunks import MLX_WIDEST_BLOCK as WIDEST_BLOCK
from mlx_distill.backends.chunks import vocabulary_blocks
from mlx_distill.objective import Objective

# replaces logits of -inf, whose differences are NaN; its probability is 0 and 0 * FLOOR is 0
FLOOR = -1e9
TINY = 1.1754944e-38  # smallest normal float32

Finish = Callable[[mx.array], mx.array]


class Head(Protocol):
    """A frozen projection to the vocabulary. `splits`: whether a range of ids costs only its share
    of the whole.
    """

    splits: bool

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


class LossRows(NamedTuple):
    """The scalar loss, which alone carries gradients, and float32[N] rows: nats, nats, 0 or 1; 0
    where weight is 0.
    """

    loss: mx.array
    kd: mx.array
    ce: mx.array
    agree: mx.array


def kd_loss(
    student_hidden: mx.array,
    student_weight: mx.array,
    teacher_hidden: mx.array | None,
    teacher_head: Head | SparseHead | None,
    targets: mx.array,
    weight: mx.array,
    objective: Objective,
    loss_tokens: float,
    chunk_tokens: int,
    train_head: bool,
    vocab: int = 0,
) -> LossRows:
    """The loss of hidden states [N, D] and [N, Dt], targets int[N] and weights [N], as the module's
    formula says.

    Differentiable in student_hidden, and in student_weight [V, D] where `train_head` (it is a
    constant otherwise). Both heads are cut to their first `vocab` ids (0: all of the student's).
    With a `SparseHead` there are no teacher_hidden. Without a teacher kd and agree are 0, and the
    objective's kd_weight must be 0. Targets must be below `vocab`: MLX does not check indices.
    """
    divisor = loss_tokens or 1.0  # nothing supervised: 0, not 0 / 0
    walk = _Walk(
        teacher_hidden,
        teacher_head,
        targets,
        weight,
        objective,
        divisor,
        chunk_tokens,
        train_head,
        vocab,
    )
    if train_head:
        return LossRows(*_with_saved_gradients(walk)(student_hidden, student_weight)[:4])
    return LossRows(
        *_with_saved_gradients(lambda hidden: walk(hidden, student_weight))(student_hidden)[:4]
    )


def score_rows(
    student_hidden: mx.array,
    student_weight: mx.array,
    teacher_hidden: mx.array | None,
    teacher_head: Head | SparseHead | None,
    targets: mx.array,
    weight: mx.array,
    objective: Objective,
    chunk_tokens: int,
    vocab: int = 0,
) -> LossRows:
    """The same rows with no gradient work; `loss` is the weighted sum, divided by nothing."""
    walk = _Walk(
        teacher_hidden,
        teacher_head,
        targets,
        weight,
        objective,
        1.0,
        chunk_tokens,
        False,
        vocab,
        False,
    )
    return LossRows(*walk(student_hidden, student_weight))


def _with_saved_gradients(
    walk: Callable[..., tuple[mx.array, ...]],
) -> Callable[..., tuple[mx.array, ...]]:
    """`walk` returns (loss, kd, ce, agree, *gradients of its arguments); its vjp only scales the
    gradients.
    """
    function = mx.custom_function(walk)

    @function.vjp
    def saved(primals, cotangents, outputs):
        gradients = [(cotangents[0] * gradient).astype(gradient.dtype) for gradient in outputs[4:]]
        return gradients[0] if len(gradients) == 1 else tuple(gradients)

    return function


@dataclass(frozen=True)
class _Walk:
    """The walk over chunks; called with the two arrays that may carry gradients."""

    teacher_hidden: mx.array | None
    teacher_head: Head | SparseHead | None
    targets: mx.array
    weight: mx.array
    objective: Objective
    loss_tokens: float
    chunk_tokens: int
    train_head: bool
    vocab: int
    gradients: bool = True

    def __call__(self, hidden: mx.array, head_weight: mx.array) -> tuple[mx.array, ...]:
        vocab = self.vocab or head_weight.shape[0]
        head = self.teacher_head
        splits = head is None or isinstance(head, SparseHead) or head.splits
        bounds = _bounds(vocab, min(self.chunk_tokens, hidden.shape[0]), splits)
        rows, hidden_grads, head_grads, done = [], [], [], []
        for start in range(0, hidden.shape[0], self.chunk_tokens):
            place = slice(start, start + self.chunk_tokens)
            weight = _after(self.weight[place, None].astype(mx.float32), done)
            chunk = self._first_pass(hidden, head_weight, bounds, place, weight)
            rows.append(self._rows(chunk, weight))
            done = list(rows[-1])
            if self.gradients:
                hidden_grad, head_grads = self._second_pass(
                    chunk, head_weight, bounds, weight / self.loss_tokens, head_grads
                )
                hidden_grads.append(hidden_grad.astype(hidden.dtype))
                done = [hidden_grads[-1], *rows[-1], *head_grads]
        loss, *columns = [mx.concatenate(column) for column in zip(*rows, strict=True)]
        outputs = (loss.sum(), *columns)
        if self.gradients:
            outputs = (*outputs, mx.concatenate(hidden_grads))
        if self.gradients and self.train_head:
            cut_off = mx.zeros(
                (head_weight.shape[0] - vocab, head_weight.shape[1]), dtype=head_weight.dtype
            )
            blocks = [block.astype(head_weight.dtype) for block in head_grads]
            outputs = (*outputs, mx.concatenate([*blocks, cut_off]))
        return outputs

    def _first_pass(
        self,
        hidden: mx.array,
        head_weight: mx.array,
        bounds: list[tuple[int, int]],
        place: slice,
        weight: mx.array,
    ) -> "_FirstPass":
        """What C positions are told by their logits; rows of weight 0 may hold anything, even NaN."""
        supervised, targets = weight != 0, self.targets[place, None].astype(mx.int32)
        inputs = mx.where(supervised, hidden[place].astype(mx.float32), 0)

        def student_logits(start: int, stop: int, after: list[mx.array]) -> mx.array:
            return _floor(_after(inputs, after) @ _promoted(head_weight, start, stop).T)

        if self.teacher_head is None:
            found = _against_nothing(student_logits, targets, bounds, self.objective)
        elif isinstance(self.teacher_head, SparseHead):
            teacher = SparseHead(*(column[place] for column in self.teacher_head))
            found = _against_some_ids(student_logits, teacher, targets, bounds, self.objective)
        else:
            teacher_inputs = mx.where(supervised, self.teacher_hidden[place].astype(mx.float32), 0)

            def teacher_logits(start: int, stop: int, after: list[mx.array]) -> mx.array:
                return _floor(self.teacher_head.logits(_after(teacher_inputs, after), start, stop))

            found = _against_logits(student_logits, teacher_logits, targets, bounds, self.objective)
        return _FirstPass(inputs, targets, *found)

    def _rows(self, chunk: "_FirstPass", weight: mx.array) -> tuple[mx.array, ...]:
        """(weight * loss / loss_tokens, kd, ce, agree), each [C]."""
        kd_weight = self.objective.kd_weight
        loss = (kd_weight * chunk.kd + (1 - kd_weight) * chunk.ce) * (weight / self.loss_tokens)
        columns = (loss, chunk.kd, chunk.ce, chunk.agree)
        return tuple(mx.where(weight != 0, column, 0)[:, 0] for column in columns)

    def _second_pass(
        self,
        chunk: "_FirstPass",
        head_weight: mx.array,
        bounds: list[tuple[int, int]],
        share: mx.array,
        head_grads: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """d loss / d hidden [C, D], and `head_grads` (a block each; empty at first) with this
        chunk's part added.
        """
        hidden_grad, new_head_grads = mx.zeros_like(chunk.inputs), []
        done: list[mx.array] = []
        for block, (start, stop) in enumerate(bounds):
            block_share = _after(share, done)
            gradient = chunk.gradient(block, block_share)
            if self.objective.needs_targets:
                ce_weight = (1 - self.objective.kd_weight) * block_share
                gradient = _add_at(gradient, chunk.targets, start, -ce_weight)
            hidden_grad = mx.addmm(hidden_grad, gradient, _promoted(head_weight, start, stop))
            done = [hidden_grad]
            if self.train_head:
                product = (gradient.T, chunk.inputs)
                new_head_grads.append(
                    mx.addmm(head_grads[block], *product) if head_grads else mx.matmul(*product)
                )
                done.append(new_head_grads[-1])
        return hidden_grad, new_head_grads


class _FirstPass(NamedTuple):
    """What the first pass over the vocabulary leaves of C positions: columns [C, 1], and the way to
    the gradient.

    `gradient(block, share)` is d loss / d logits of a block, `share` [C, 1] times, all but what the
    targets take from it.
    """

    inputs: mx.array
    targets: mx.array
    kd: mx.array
    ce: mx.array
    agree: mx.array
    gradient: Callable[[int, mx.array], mx.array]


Logits = Callable[[int, int, list[mx.array]], mx.array]  # of a block, computed after some arrays
Found = tuple[
    mx.array, mx.array, mx.array, Callable[[int, mx.array], mx.array]
]  # kd, ce, agree, gradient


def _against_nothing(
    student_logits: Logits, targets: mx.array, bounds: list[tuple[int, int]], objective: Objective
) -> Found:
    """Without a teacher: the cross-entropy alone."""
    softmax, target_logit, done = _Softmax(), _Picked(targets), []
    for start, stop in bounds:
        z = student_logits(start, stop, done)
        done = [*target_logit.add(z, start), *softmax.add(z, z.max(axis=1, keepdims=True))]
    softmax.close()
    nothing = mx.zeros(targets.shape)

    def gradient(block: int, share: mx.array) -> mx.array:
        return softmax.kept[block] * ((1 - objective.kd_weight) * share * softmax.scales[block])

    return nothing, softmax.minus_log(target_logit.logits), nothing, gradient


def _against_logits(
    student_logits: Logits,
    teacher_logits: Logits,
    targets: mx.array,
    bounds: list[tuple[int, int]],
    objective: Objective,
) -> Found:
    """Against all of the teacher's logits: the divergence at the objective's temperature, the
    cross-entropy at 1.
    """
    temperature, shared = objective.temperature, objective.temperature == 1
    plain, teacher = _Softmax(), _Softmax()
    student = plain if shared else _Softmax()  # one softmax serves both terms
    divergence = _divergence(objective)
    target_logit, choice, teacher_choice = _Picked(targets), _MostLikely(), _MostLikely()
    done: list[mx.array] = []
    for start, stop in bounds:
        z = student_logits(start, stop, done)
        t = teacher_logits(start, stop, [z])
        top, teacher_top = choice.add(z, start), teacher_choice.add(t, start)
        done = [*target_logit.add(z, start), *plain.add(z, top), *choice.best, *teacher_choice.best]
        if not shared:
            z, top, t, teacher_top = (
                z / temperature,
                top / temperature,
                t / temperature,
                teacher_top / temperature,
            )
            done += student.add(z, top)
        done += teacher.add(t, teacher_top)
        done += divergence.add(student.kept[-1], teacher.kept[-1], z, t)
    for softmax in (plain, teacher) if shared else (plain, student, teacher):
        softmax.close()
    kd = objective.divergence_scale * divergence.close(student, teacher)
    weight = objective.kd_weight * objective.divergence_scale / temperature

    def gradient(block: int, share: mx.array) -> mx.array:
        ce_share = (1 - objective.kd_weight) * share
        found = None
        if objective.needs_teacher:
            found = divergence.gradient(
                block, weight * share, ce_share if shared else mx.zeros_like(share)
            )
        if objective.needs_targets and not (shared and objective.needs_teacher):
            of_ce = plain.kept[block] * (ce_share * plain.scales[block])
            found = of_ce if found is None else found + of_ce
        return found

    agree = (choice.id == teacher_choice.id).astype(mx.float32)
    return kd, plain.minus_log(target_logit.logits), agree, gradient


def _against_some_ids(
    student_logits: Logits,
    teacher: SparseHead,
    targets: mx.array,
    bounds: list[tuple[int, int]],
    objective: Objective,
) -> Found:
    """Against K of the teacher's ids and the log of the rest: both models are compared over K + 1
    outcomes.

    The last outcome's logit is the log-sum-exp of all other ids, so its gradient is shared among
    them by their softmax. With the student's K logits it also gives the cross-entropy.
    """
    others, target_logit, known, choice = (
        _Softmax(),
        _Picked(targets),
        _Picked(teacher.ids),
        _MostLikely(),
    )
    done: list[mx.array] = []
    for start, stop in bounds:
        z = student_logits(start, stop, done)
        choice.add(z, start)
        done = [*target_logit.add(z, start), *known.add(z, start), *choice.best]
        rest = _add_at(z, teacher.ids, start, FLOOR)
        done += others.add(rest, rest.max(axis=1, keepdims=True))
    others.close()
    outcomes = mx.concatenate([known.logits, others.top + others.log_sum], axis=1)
    answers = _floor(mx.concatenate([teacher.log_probs, teacher.tail[:, None]], axis=1))
    of_student, of_teacher, divergence = _Softmax(), _Softmax(), _divergence(objective)
    for softmax, logits in ((of_student, outcomes), (of_teacher, answers)):
        softmax.add(logits, logits.max(axis=1, keepdims=True))
        softmax.close()
    divergence.add(of_student.kept[0], of_teacher.kept[0], outcomes, answers)
    kd = divergence.close(of_student, of_teacher) + teacher.offset[:, None]

    def gradient(block: int, share: mx.array) -> mx.array:
        of_outcomes = divergence.gradient(
            0, objective.kd_weight * share, (1 - objective.kd_weight) * share
        )
        found = others.kept[block] * (of_outcomes[:, -1:] * others.scales[block])
        return _add_at(found, teacher.ids, bounds[block][0], of_outcomes[:, :-1])

    agree = (choice.id == teacher.top[:, None]).astype(mx.float32)
    return kd, of_student.minus_log(target_logit.logits), agree, gradient


class _Softmax:
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
        self.sums.append(_row_sum(self.kept[-1]))
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

    def log_ratio(self, other: "_Softmax") -> mx.array:
        """log Z / log Z of the other, [C, 1]."""
        return (self.top - other.top) + (self.log_sum - other.log_sum)

    def minus_log(self, logit: mx.array) -> mx.array:
        """-log of the probability of an id with this logit [C, 1]."""
        return self.log_sum - (logit - self.top)


class _Picked:
    """The logits [C, K] of some ids, met block by block; an id below 0 is none."""

    def __init__(self, ids: mx.array) -> None:
        self.ids, self.logits = ids, mx.full(ids.shape, FLOOR)

    def add(self, logits: mx.array, start: int) -> list[mx.array]:
        here, columns = _place(self.ids, start, logits.shape[1])
        self.logits = mx.where(here, mx.take_along_axis(logits, columns, axis=1), self.logits)
        return [self.logits]


class _MostLikely:
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


# A divergence is met block by block: `add` takes what both softmaxes keep of a block and its
# (scaled) logits and returns what must be computed before the next; `close` gives the divergence
# [C, 1]; `gradient(block, weight, ce_weight)` is weight [C, 1] times its gradient with respect to
# the block's logits plus ce_weight times the student's probabilities.


class _ForwardKL:
    """Σ t (log t - log s) = Σ t (v - u) + log Z_s - log Z_t for scaled logits u, v; gradient s - t.
    Linear: one pass is enough.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []
        self.sums: list[mx.array] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, teacher))
        self.sums.append(_row_dot(teacher, v - u))
        return [self.sums[-1]]

    def close(self, student: _Softmax, teacher: _Softmax) -> mx.array:
        self.student_scales, self.teacher_scales = student.scales, teacher.scales
        return teacher.mean(self.sums) + student.log_ratio(teacher)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, teacher = self.kept[block]
        a = (weight + ce_weight) * self.student_scales[block]
        return _blend(student, a, teacher, -weight * self.teacher_scales[block])


class _ReverseKL:
    """Σ s (log s - log t) = Σ s (u - v) - log Z_s + log Z_t; gradient s (log s/t - KL). Linear too."""

    def __init__(self) -> None:
        self.kept: list[tuple[mx.array, mx.array]] = []
        self.sums: list[mx.array] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, u - v))
        self.sums.append(_row_dot(*self.kept[-1]))
        return [self.kept[-1][1], self.sums[-1]]

    def close(self, student: _Softmax, teacher: _Softmax) -> mx.array:
        self.student_scales = student.scales
        self.mean_difference = student.mean(self.sums)
        return self.mean_difference - student.log_ratio(teacher)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        student, difference = self.kept[block]
        scale = self.student_scales[block]
        return _advantage(
            student, difference, self.mean_difference, weight * scale, ce_weight * scale
        )


class _Pointwise:
    """Any pair of f and g = ∂f/∂u: Σ f, and gradient g - s Σ g.

    Both want normalised probabilities, so `close` passes once more over what was kept, and keeps g.
    """

    def __init__(self, pair: Callable, parameter: float) -> None:
        self.terms, self.parameter = _terms_of(pair), mx.array(parameter)
        self.kept: list[tuple[mx.array, ...]] = []

    def add(self, student: mx.array, teacher: mx.array, u: mx.array, v: mx.array) -> list[mx.array]:
        self.kept.append((student, teacher, u, v))
        return []

    def close(self, student: _Softmax, teacher: _Softmax) -> mx.array:
        kept, self.kept = self.kept, []
        values, totals, done = [], [], []
        for block, (s, t, u, v) in enumerate(kept):
            s, t = s * _after(student.scales[block], done), t * teacher.scales[block]
            normalisers = (student.top, student.log_sum, teacher.top, teacher.log_sum)
            f, g = self.terms(u, v, s, t, *normalisers, self.parameter)
            self.kept.append((s, g))
            values.append(_row_sum(f))
            totals.append(_row_sum(g))
            done = [g, values[-1], totals[-1]]
        self.total = sum(totals)
        return sum(values)

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        probability, g = self.kept[block]
        return _blend(probability, ce_weight - weight * self.total, g, weight)


@cache
def _terms_of(pair: Callable) -> Callable:
    """`pair` of scaled logits and probabilities, compiled. Log-probabilities that a pair does not
    look at are never computed.
    """

    @mx.compile
    def terms(
        u, v, s, t, top, log_sum, teacher_top, teacher_log_sum, parameter
    ) -> tuple[mx.array, mx.array]:
        return pair((u - top) - log_sum, (v - teacher_top) - teacher_log_sum, s, t, parameter)

    return terms


# `objective.py`'s pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v and their
# exponentials s and t. What is a multiple of s may be left out of g: g - s Σ g is the same without
# it.


def _forward_kl(
    u: mx.array, v: mx.array, s: mx.array, t: mx.array, parameter: mx.array
) -> tuple[mx.array, mx.array]:
    return t * (v - u), -t


def _reverse_kl(
    u: mx.array, v: mx.array, s: mx.array, t: mx.array, parameter: mx.array
) -> tuple[mx.array, mx.array]:
    return s * (u - v), s * (u - v)


def _jsd(
    u: mx.array, v: mx.array, s: mx.array, t: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    of_student, of_teacher = (1 - beta) * s, beta * t
    m = mx.maximum(of_student + of_teacher, TINY)
    student = of_student * mx.log(mx.maximum(s, TINY) / m)
    return student + of_teacher * mx.log(mx.maximum(t, TINY) / m), student


def _skew_kl(
    u: mx.array, v: mx.array, s: mx.array, t: mx.array, alpha: mx.array
) -> tuple[mx.array, mx.array]:
    ratio = mx.maximum(t, TINY) / mx.maximum((1 - alpha) * s + alpha * t, TINY)
    return t * mx.log(ratio), (alpha - 1) * s * ratio


def _skew_reverse_kl(
    u: mx.array, v: mx.array, s: mx.array, t: mx.array, alpha: mx.array
) -> tuple[mx.array, mx.array]:
    ratio = mx.maximum(s, TINY) / mx.maximum((1 - alpha) * t + alpha * s, TINY)
    return s * mx.log(ratio), s * (mx.log(ratio) - alpha * ratio)


_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
_LINEAR = {"forward_kl": _ForwardKL, "reverse_kl": _ReverseKL}


def _divergence(objective: Objective) -> _ForwardKL | _ReverseKL | _Pointwise:
    if linear := _LINEAR.get(objective.divergence):
        return linear()
    return _Pointwise(_DIVERGENCES[objective.divergence], objective.parameter)


@mx.compile
def _blend(x: mx.array, a: mx.array, y: mx.array, b: mx.array) -> mx.array:
    return x * a + y * b


@mx.compile
def _advantage(
    s: mx.array, difference: mx.array, mean: mx.array, a: mx.array, b: mx.array
) -> mx.array:
    return s * ((difference - mean) * a + b)


def _promoted(head_weight: mx.array, start: int, stop: int) -> mx.array:
    return head_weight[start:stop].astype(mx.float32)


def _place(ids: mx.array, start: int, size: int) -> tuple[mx.array, mx.array]:
    """Which ids lie in a block, and their columns in it; 0 or the last one for those that do not."""
    return (ids >= start) & (ids < start + size), mx.clip(ids - start, 0, size - 1)


def _add_at(x: mx.array, ids: mx.array, start: int, amount: mx.array | float) -> mx.array:
    """A block x [C, size] with `amount` [C, K] added at those ids [C, K] that lie in it."""
    here, columns = _place(ids, start, x.shape[1])
    return x.at[mx.arange(len(x))[:, None], columns].add(mx.where(here, amount, 0))


def _floor(logits: mx.array) -> mx.array:
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


def _row_sum(x: mx.array) -> mx.array:
    """[C, 1]; on a CPU through BLAS, whose blocked sums are five times faster and closer."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return x @ mx.ones((x.shape[1], 1)) if on_cpu else x.sum(axis=1, keepdims=True)


def _row_dot(x: mx.array, y: mx.array) -> mx.array:
    """[C, 1]"""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return (x[:, None] @ y[:, :, None])[:, 0] if on_cpu else (x * y).sum(axis=1, keepdims=True)


def _bounds(vocab: int, rows: int, splits: bool) -> list[tuple[int, int]]:
    """The blocks of the vocabulary, as equal as they come."""
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    limits = BLOCK_ELEMENTS[device], WIDEST_BLOCK.get(device, 0)
    count = vocabulary_blocks(vocab, rows, *limits) if splits else 1
    edges = [vocab * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _after(x: mx.array, dependencies: list[mx.array]) -> mx.array:
    """x, but only once the dependencies are computed."""
    return mx.depends([x], dependencies)[0] if dependencies else x
