"""The distillation loss on torch, walked over chunks of positions so that [N, V] exists nowhere.

In: hidden states of student and teacher at the N loss positions, the student's head, the teacher's
`Head`, targets and weights. Out: the scalar loss, and per position the divergence, the
cross-entropy and whether both name the same token. Decided here: how the walk is cut and what it
keeps. The naive equivalent, in float32, is

    z = student_hidden @ student_weight.T            u = log_softmax(z / T)      # [N, V]
    t = teacher_head(teacher_hidden)                 v = log_softmax(t / T)      # [N, V]
    kd = scale * divergence(u, v)                    ce = -log_softmax(z)[target]
    loss = sum(weight * (kd_weight * kd + (1 - kd_weight) * ce)) / loss_tokens

A chunk makes its logits, its rows and the gradients of the hidden states and of the head in one
visit; `backward` only scales what was made. On a CPU fresh pages cost more than the arithmetic: a
buffer [C, V] for each model's logits serves all chunks, the elementwise part is written with `out=`
and in place, and it goes over a few rows at a time, which stay in the cache from one pass to the
next. On CUDA it is compiled over the chunk into a few kernels, which write its results alone. Torch
runs eagerly, so chunks need no ordering (MLX's do). A bfloat16 head is promoted to float32 block by
block on a CPU; on CUDA the products take bfloat16 and sum in float32 where the student computes in
bfloat16. Axes: `N` loss positions, `C` positions per chunk, `V` vocabulary, `D` width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlx_distill.backends.chunks import TORCH_ROWS_AT_ONCE as ROWS_AT_ONCE
from mlx_distill.backends.chunks import even_chunk
from mlx_distill.objective import Objective

BLOCK_ROWS = 8192  # of a half-precision head that are promoted at once on a CPU
# as in a last chunk: BLAS loses a decimal of their sums over a vocabulary (MKL: of one to three
# rows)
FEW_ROWS = 8
ARGMAX_IDS = 512  # of a vocabulary that are searched at once on a CPU
# replaces logits of -inf, whose differences are NaN; its probability is 0 and 0 * FLOOR is 0
FLOOR = -1e9
TINY = 1.1754944e-38  # smallest normal float32

Finish = Callable[[Tensor], Tensor]


class Head(Protocol):
    """A frozen projection to the vocabulary."""

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        """float32 logits [C, rows] of the first `rows` ids from hidden states [C, D], in `out` if
        that suits.
        """


@dataclass(frozen=True)
class MatrixHead:
    """`finish(hidden @ weight.T + bias)`, weight [V, D] in any float type; finish is elementwise
    (cap, scale).
    """

    weight: Tensor
    bias: Tensor | None = None
    finish: Finish | None = None

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        logits = _project(hidden, self.weight[:rows], out)
        if self.bias is not None:
            logits += self.bias[:rows].float()
        return logits if self.finish is None else self.finish(logits).float()


@dataclass(frozen=True)
class CallableHead:
    """Any function from hidden states [C, D] to logits [C, V or more]."""

    function: Callable[[Tensor], Tensor]

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        return self.function(hidden)[:, :rows].float()


class SparseHead(NamedTuple):
    """`SparseTargets` as tensors: what takes the place of the teacher's head where only K of its
    answers [N, K] are known.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    offset: Tensor
    top: Tensor

    def rows(self, place: slice) -> "SparseHead":
        return SparseHead(*(column[place] for column in self))


TeacherOutputs = Tensor | SparseHead | None  # the teacher's logits [C, V], or what is known of them


class Work(NamedTuple):
    """Buffers that chunks share on a CPU: logits [C, V] of student and teacher, and [ROWS_AT_ONCE,
    V].
    """

    student: Tensor
    teacher: Tensor
    spare: Tensor


class LossRows(NamedTuple):
    """The scalar loss, which alone carries gradients, and float32[N] rows: nats, nats, 0 or 1; 0
    where weight is 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agree: Tensor


def kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | SparseHead | None,
    targets: Tensor,
    weight: Tensor,
    objective: Objective,
    loss_tokens: float,
    chunk_tokens: int,
    train_head: bool,
    vocab: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LossRows:
    """The loss of hidden states [N, D] and [N, Dt], targets int[N] and weights [N], as the module's
    formula says.

    Differentiable in student_hidden, and in student_weight [V, D] where `train_head`; backward may
    run once. Both heads are cut to their first `vocab` ids (0: all of the student's). With a
    `SparseHead` there are no teacher_hidden. Without a teacher kd and agree are 0, and the
    objective's kd_weight must be 0. `dtype` is what products take on CUDA; sums and logits are
    float32 everywhere.
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
        vocab,
        dtype,
    )
    return LossRows(
        *_SavedGradients.apply(
            walk, student_hidden, student_weight if train_head else student_weight.detach()
        )
    )


@torch.no_grad()
def score_rows(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | SparseHead | None,
    targets: Tensor,
    weight: Tensor,
    objective: Objective,
    chunk_tokens: int,
    vocab: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LossRows:
    """The same rows with no gradient work; `loss` is the weighted sum, divided by nothing."""
    walk = _Walk(
        teacher_hidden, teacher_head, targets, weight, objective, 1.0, chunk_tokens, vocab, dtype
    )
    rows, _, _ = walk(student_hidden, student_weight, False, False)
    return rows


class _SavedGradients(torch.autograd.Function):
    """Runs a walk, keeps the gradients that it made, and scales them when they are asked for."""

    @staticmethod
    def forward(ctx, walk: "_Walk", hidden: Tensor, head_weight: Tensor) -> LossRows:
        rows, *gradients = walk(
            hidden, head_weight, ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.set_materialize_grads(False)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
        return None, *(
            None if gradient is None else gradient.mul_(of_loss) for gradient in ctx.saved_tensors
        )


@dataclass(frozen=True)
class _Walk:
    """The walk over chunks; called with the two arrays that may carry gradients and whether they
    do.
    """

    teacher_hidden: Tensor | None
    teacher_head: Head | SparseHead | None
    targets: Tensor
    weight: Tensor
    objective: Objective
    loss_tokens: float
    chunk_tokens: int
    vocab: int
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(
        self, hidden: Tensor, head_weight: Tensor, train_hidden: bool, train_head: bool
    ) -> tuple:
        """(rows, gradient of the hidden states, gradient of the head); a gradient that is not asked
        for is None.
        """
        matrix = head_weight[: self.vocab or len(head_weight)]
        matrix = matrix.to(self.dtype) if matrix.is_cuda else matrix
        count = len(hidden)
        size = even_chunk(count, self.chunk_tokens)  # a small last one costs nearly as much
        heights = (size, size if self.teacher_hidden is not None else 0, min(size, ROWS_AT_ONCE))
        work = (
            None
            if matrix.is_cuda
            else Work(*(torch.empty((height, len(matrix))) for height in heights))
        )
        hidden_grad = torch.empty_like(hidden) if train_hidden else None
        head_grad = torch.empty(head_weight.shape, device=hidden.device) if train_head else None
        columns = []
        for start in range(0, count, size):
            place = slice(start, start + size)
            inputs, gradient, rows = self._chunk(
                hidden, matrix, place, work, train_hidden or train_head
            )
            columns.append(rows)
            if train_hidden:
                hidden_grad[place] = _product(gradient, matrix)
            if train_head:
                _add_product(head_grad[: len(matrix)], gradient.T, inputs, first=start == 0)
        loss, kd, ce, agree = (torch.cat(column) for column in zip(*columns, strict=True))
        if train_head:
            head_grad[len(matrix) :] = 0  # of a head that is cut
            head_grad = head_grad.to(head_weight.dtype)
        return LossRows(loss.sum(), kd, ce, agree), hidden_grad, head_grad

    def _chunk(
        self, hidden: Tensor, matrix: Tensor, place: slice, work: Work | None, wants_gradient: bool
    ) -> tuple:
        """(inputs [C, D], d loss / d logits [C, V], (weighted loss, kd, ce, agree) [C] each); the
        gradient may lie in `work`.
        """
        weight = self.weight[place, None].float()
        supervised = weight != 0
        inputs = torch.where(supervised, hidden[place], 0)  # a row of weight 0 may hold NaN
        inputs = inputs.to(torch.float32 if work else self.dtype)
        logits, teacher = _project(inputs, matrix, work and work.student[: len(inputs)]), None
        if self.teacher_hidden is not None:
            teacher_hidden = torch.where(supervised, self.teacher_hidden[place], 0)
            teacher_hidden = teacher_hidden.float() if work else teacher_hidden
            teacher = self.teacher_head.logits(
                teacher_hidden, len(matrix), work and work.teacher[: len(inputs)]
            )
        elif self.teacher_head is not None:
            teacher = self.teacher_head.rows(place)
        targets, share = self.targets[place, None].long(), weight / self.loss_tokens
        arguments = (targets, share, self.objective, wants_gradient)
        if work:
            gradient, kd, ce, agree = _by_rows(logits, teacher, work.spare, *arguments)
        else:
            at_once = _at_once if isinstance(teacher, SparseHead) else _compiled(_at_once)
            gradient, kd, ce, agree = at_once(logits, teacher, *arguments, self.dtype)
        loss = (self.objective.kd_weight * kd + (1 - self.objective.kd_weight) * ce) * share
        columns = (loss, kd, ce, agree)
        return (
            inputs,
            gradient,
            tuple(torch.where(supervised, column, 0)[:, 0] for column in columns),
        )


def _by_rows(
    logits: Tensor,
    teacher: TeacherOutputs,
    spare: Tensor,
    targets: Tensor,
    share: Tensor,
    objective: Objective,
    wants_gradient: bool,
) -> tuple[Tensor, ...]:
    """(`share` of the gradient, which replaces the logits, kd, ce, agree): as many rows at once as
    `spare` has.
    """
    columns = []
    for start in range(0, len(logits), len(spare)):
        rows = slice(start, start + len(spare))
        z = logits[rows]
        gradient, *column = _logit_gradient(
            z, _rows_of(teacher, rows), spare[: len(z)], targets[rows], objective, wants_gradient
        )
        columns.append(column)
        if wants_gradient:
            torch.mul(gradient, share[rows], out=z)
    return logits, *map(torch.cat, zip(*columns, strict=True))


def _rows_of(teacher: TeacherOutputs, rows: slice) -> TeacherOutputs:
    if teacher is None:
        return None
    return teacher.rows(rows) if isinstance(teacher, SparseHead) else teacher[rows]


def _at_once(
    logits: Tensor,
    teacher: TeacherOutputs,
    targets: Tensor,
    share: Tensor,
    objective: Objective,
    wants_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The same over all rows, the gradient in `dtype`. What is overwritten are copies: compiled,
    they are never made.
    """
    teacher = teacher.clone() if isinstance(teacher, Tensor) else teacher
    gradient, *column = _logit_gradient(
        logits.clone(), teacher, torch.empty_like(logits), targets, objective, wants_gradient
    )
    return gradient.mul(share).to(dtype) if wants_gradient else None, *column


def _logit_gradient(
    z: Tensor,
    teacher: TeacherOutputs,
    spare: Tensor,
    targets: Tensor,
    objective: Objective,
    wants_gradient: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(d loss / d z, kd, ce, agree) of the student's logits z [C, V].

    Logits of student and teacher and the spare buffer are overwritten; the gradient lies in one of
    them.
    """
    z.clamp_(min=FLOOR)
    if teacher is None:
        return _against_nothing(z, spare, targets, 1 - objective.kd_weight, wants_gradient)
    if isinstance(teacher, SparseHead):
        return _against_some_ids(z, teacher, spare, targets, objective, wants_gradient)
    return _against_logits(z, teacher, spare, targets, objective, wants_gradient)


def _against_nothing(
    z: Tensor, spare: Tensor, targets: Tensor, ce_weight: float, wants_gradient: bool
) -> tuple:
    """Cross-entropy alone; its gradient is `ce_weight` times the student's probabilities less one
    at the target.
    """
    nothing = z.new_zeros((len(z), 1))
    u = _log_softmax(z, spare)
    ce = -u.gather(1, targets)
    if not wants_gradient:
        return None, nothing, ce, nothing
    gradient = u.exp_().mul_(ce_weight)
    _subtract_at(gradient, targets, ce_weight)
    return gradient, nothing, ce, nothing


def _against_logits(
    z: Tensor, t: Tensor, spare: Tensor, targets: Tensor, objective: Objective, wants_gradient: bool
) -> tuple:
    """Against the teacher's logits t [C, V]: the divergence at the objective's temperature, the
    cross-entropy at 1.
    """
    t.clamp_(min=FLOOR)
    agree = (_most_likely(z) == _most_likely(t)).float()
    temperature, ce_weight = objective.temperature, 1 - objective.kd_weight
    shared = temperature == 1  # both terms are of the same softmax
    if not shared:
        plain = _log_softmax(z, torch.empty_like(z))
        ce = -plain.gather(1, targets)
        z.div_(temperature), t.div_(temperature)
    u = _log_softmax(z, spare)
    if shared:
        ce = -u.gather(1, targets)
    v = _log_softmax(t, z)
    weight = objective.kd_weight * objective.divergence_scale / temperature
    kd, gradient = _divergence(
        u, v, t, objective, weight, ce_weight if shared else 0.0, wants_gradient
    )
    kd = kd * objective.divergence_scale
    if not wants_gradient:
        return None, kd, ce, agree
    if objective.needs_targets:
        if not shared:
            gradient.add_(plain.exp_().mul_(ce_weight))
        _subtract_at(gradient, targets, ce_weight)
    return gradient, kd, ce, agree


def _against_some_ids(
    z: Tensor,
    teacher: SparseHead,
    spare: Tensor,
    targets: Tensor,
    objective: Objective,
    wants_gradient: bool,
) -> tuple:
    """Against K ids and the log of the rest: student and teacher are compared over K + 1 outcomes.

    The last outcome's logit is the log-sum-exp of all other ids, so its gradient is shared among
    them by their softmax.
    """
    known, ids = teacher.ids >= 0, teacher.ids.clamp(min=0).long()
    agree = (_most_likely(z) == teacher.top[:, None]).float()
    target_logit = z.gather(1, targets)
    kept = torch.where(known, z.gather(1, ids), FLOOR)
    others = z.scatter_add_(1, ids, torch.where(known, FLOOR, 0.0))
    log_share = _log_softmax(others, spare)
    rest = others.amax(1, keepdim=True) - log_share.amax(1, keepdim=True)
    outcomes = torch.cat([kept, rest], 1)
    ce = outcomes.logsumexp(1, keepdim=True) - target_logit
    u = outcomes.log_softmax(1)
    v = torch.cat([teacher.log_probs, teacher.tail[:, None]], 1).clamp_(min=FLOOR).log_softmax(1)
    kd_weight, ce_weight = objective.kd_weight, 1 - objective.kd_weight
    kd, gradient = _divergence(
        u, v, torch.empty_like(u), objective, kd_weight, ce_weight, wants_gradient
    )
    kd = kd + teacher.offset[:, None]
    if not wants_gradient:
        return None, kd, ce, agree
    everywhere = log_share.exp_().mul_(gradient[:, -1:])
    everywhere.scatter_add_(1, ids, torch.where(known, gradient[:, :-1], 0.0))
    everywhere.scatter_add_(1, targets, torch.full_like(ce, -ce_weight))
    return everywhere, kd, ce, agree


def _divergence(
    u: Tensor,
    v: Tensor,
    spare: Tensor,
    objective: Objective,
    weight: float,
    ce_weight: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence [C, 1] of log-probabilities u and v, and `weight` of its gradient plus
    `ce_weight` of the student's probabilities, [C, V]. u, v and the spare buffer are overwritten.

    With the sums over the vocabulary, f and g as `objective.py` defines them: Σ f, and weight (g -
    s Σ g) + ce_weight s.
    """
    if fused := _FUSED.get(objective.divergence):
        return fused(u, v, spare, weight, ce_weight, wants_gradient)
    s = torch.exp(u, out=spare)
    f, g = _DIVERGENCES[objective.divergence](u, v, s, v.exp(), objective.parameter)
    value = f.sum(1, keepdim=True)
    if not wants_gradient:
        return value, None
    of_student = ce_weight - weight * g.sum(1, keepdim=True)
    return value, g.mul_(weight).addcmul_(s, of_student)


# `objective.py`'s pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v and their
# exponentials s and t, which stay as they are. What is a multiple of s may be left out of g: g - s
# Σ g is the same without it.


def _forward_kl(
    u: Tensor, v: Tensor, s: Tensor, t: Tensor, parameter: float
) -> tuple[Tensor, Tensor]:
    return t * (v - u), -t


def _reverse_kl(
    u: Tensor, v: Tensor, s: Tensor, t: Tensor, parameter: float
) -> tuple[Tensor, Tensor]:
    f = s * (u - v)
    return f, f.clone()


def _jsd(u: Tensor, v: Tensor, s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    m = torch.lerp(s, t, beta).clamp_(min=TINY)
    student = s.clamp(min=TINY).div_(m).log_().mul_(s).mul_(1 - beta)
    return t.clamp(min=TINY).div_(m).log_().mul_(t).mul_(beta).add_(student), student


def _skew_kl(u: Tensor, v: Tensor, s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    ratio = t.clamp(min=TINY).div_(torch.lerp(s, t, alpha).clamp_(min=TINY))
    return ratio.log().mul_(t), ratio.mul_(s).mul_(alpha - 1)


def _skew_reverse_kl(
    u: Tensor, v: Tensor, s: Tensor, t: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    ratio = s.clamp(min=TINY).div_(torch.lerp(t, s, alpha).clamp_(min=TINY))
    f = ratio.log().mul_(s)
    return f, torch.sub(f, ratio.mul_(s), alpha=alpha)


_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}


# The two that are used most, in place: no buffer is made.


def _forward_kl_in_place(
    u: Tensor, v: Tensor, spare: Tensor, weight: float, ce_weight: float, wants_gradient: bool
) -> tuple:
    """Σ t (v - u), and weight (s - t) + ce_weight s."""
    difference = torch.sub(v, u, out=spare)
    teacher = v.exp_()
    value = _row_dot(teacher, difference, difference)
    if not wants_gradient:
        return value, None
    student = u.exp_()
    return value, (student if weight + ce_weight == 1 else student.mul_(weight + ce_weight)).sub_(
        teacher, alpha=weight
    )


def _reverse_kl_in_place(
    u: Tensor, v: Tensor, spare: Tensor, weight: float, ce_weight: float, wants_gradient: bool
) -> tuple:
    """Σ s (u - v), and s (weight (u - v - Σ s (u - v)) + ce_weight)."""
    difference = torch.sub(u, v, out=spare)
    student = u.exp_()
    value = _row_dot(student, difference, v)
    if not wants_gradient:
        return value, None
    return value, difference.sub_(value).mul_(weight).add_(ce_weight).mul_(student)


_FUSED = {"forward_kl": _forward_kl_in_place, "reverse_kl": _reverse_kl_in_place}


@cache
def _compiled(function: Callable) -> Callable:
    """Fused kernels, where the installed torch can make them; what runs eagerly is the same, more
    slowly.
    """
    torch._dynamo.config.suppress_errors = True  # no compiler on this machine: run eagerly
    return torch.compile(function)


def _log_softmax(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten._log_softmax.out(x, 1, False, out=out)


def _most_likely(logits: Tensor) -> Tensor:
    """The first most likely id of each row, int64[C, 1].

    A CPU's argmax takes four times as long as its amax: the maxima of ranges of ids say which range
    to search.
    """
    size = ARGMAX_IDS
    if torch.compiler.is_compiling() or logits.is_cuda or logits.shape[1] < 2 * size:
        return logits.argmax(1, keepdim=True)
    ranges = [part.amax(-1) for part in _ranges(logits, size)]
    first = torch.cat(ranges, 1).argmax(1, keepdim=True)
    start = (first * size).clamp(max=logits.shape[1] - size)
    window = logits.gather(1, start + torch.arange(size))
    return start + window.argmax(1, keepdim=True)


def _ranges(logits: Tensor, size: int) -> list[Tensor]:
    """`logits` [C, V] as views [C, V // size, size] and, if something is left, [C, 1, V % size]."""
    even = logits.shape[1] // size * size
    views = [logits[:, :even].unflatten(1, (-1, size)), logits[:, None, even:]]
    return [view for view in views if view.shape[2]]


def _subtract_at(x: Tensor, ids: Tensor, amount: float) -> None:
    """`amount` less at one id of each row; a compiler fuses the comparison, while scattering would
    have it write [C, V] and read it.
    """
    if torch.compiler.is_compiling():
        x.sub_((torch.arange(x.shape[1], device=x.device) == ids).to(x.dtype), alpha=amount)
    else:
        x.scatter_add_(1, ids, x.new_full((len(x), 1), -amount))


def _row_dot(x: Tensor, y: Tensor, work: Tensor) -> Tensor:
    """[C, 1]; the products are left in `work`, which may be x or y."""
    return torch.mul(x, y, out=work).sum(1, keepdim=True)


def _project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 hidden @ weight.T, [C, V]; both in one half-precision type on CUDA are summed in
    float32.
    """
    if hidden.is_cuda:
        return _product(hidden.to(weight.dtype), weight.T)
    out = torch.empty((len(hidden), len(weight))) if out is None else out
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=out)
    for start in range(0, len(weight), BLOCK_ROWS):
        block = weight[start : start + BLOCK_ROWS].float()
        out[:, start : start + len(block)] = hidden @ block.T
    return out


def _product(left: Tensor, right: Tensor) -> Tensor:
    """float32 left @ right; where `right` is in half precision on CUDA `left` is rounded to it, and
    promoted by block on a CPU.

    Few rows are multiplied by block in float32 too: a CPU's BLAS adds a whole vocabulary one after
    the other for them.
    """
    if right.dtype == torch.float32 and (left.is_cuda or len(left) > FEW_ROWS):
        return left @ right
    if left.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    size = BLOCK_ROWS if len(left) > FEW_ROWS else max(1, BLOCK_ROWS // 8)
    return sum(
        left[:, start : start + size] @ right[start : start + size].float()
        for start in range(0, len(right), size)
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, in place; the first one replaces what `total` holds."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(_product(left, right))
    else:
        total += _product(left, right)
