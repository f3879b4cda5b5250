"""The distillation loss on torch, walked over chunks of positions so that [N, V] exists nowhere.

In: hidden states of student and teacher at the N loss positions, the student's head, the teacher's `Head`, targets and
weights. Out: the scalar loss, and per position the divergence, the cross-entropy and whether both name the same token.
Decided here: how the walk is cut and what it keeps. The naive equivalent, in float32, is

    z = student_hidden @ student_weight.T            u = log_softmax(z / T)      # [N, V]
    t = teacher_head(teacher_hidden)                 v = log_softmax(t / T)      # [N, V]
    kd = scale * divergence(u, v)                    ce = -log_softmax(z)[target]
    loss = sum(weight * (kd_weight * kd + (1 - kd_weight) * ce)) / loss_tokens

A chunk makes its logits, its rows and the gradients of the hidden states and of the head in one visit; `backward` only
scales what was made. On a CPU fresh pages cost more than the arithmetic: a buffer [C, V] for each model's logits serves all
chunks, the elementwise part is written with `out=` and in place, and it goes over a few rows at a time, which stay in the
cache from one pass to the next. On CUDA it is compiled over the chunk into a few kernels, which write its results alone.
Torch runs eagerly, so chunks need no ordering (MLX's do). A bfloat16 head is promoted to float32 block by block on a CPU; on
CUDA the products take bfloat16 and sum in float32 where the student computes in bfloat16.
Axes: `N` loss positions, `C` positions per chunk, `V` vocabulary, `D` width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlx_distill.objective import Objective, even_chunk

CROSS_ROWS = 16  # positions that the elementwise part works on at once on a CPU
BLOCK_ROWS = 8192  # of a half-precision head that are promoted at once on a CPU
FEW_ROWS = 8  # as in a last chunk: BLAS loses a decimal of their sums over a vocabulary (MKL: of one to three rows)
ARGMAX_IDS = 512  # of a vocabulary that are searched at once on a CPU
FLOOR = -1e9  # replaces logits of -inf, whose differences are NaN; its probability is 0 and 0 * FLOOR is 0

Finish = Callable[[Tensor], Tensor]


class Head(Protocol):
    """A frozen projection to the vocabulary."""

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        """float32 logits [C, rows] of the first `rows` ids from hidden states [C, D], in `out` if that suits."""


@dataclass(frozen=True)
class MatrixHead:
    """`finish(hidden @ weight.T + bias)`, weight [V, D] in any float type; finish is elementwise (cap, scale)."""

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
    """`SparseTargets` as tensors: what takes the place of the teacher's head where only K of its answers [N, K] are known."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    offset: Tensor
    top: Tensor

    def rows(self, place: slice) -> "SparseHead":
        return SparseHead(*(column[place] for column in self))


Answers = Tensor | SparseHead | None  # the teacher's logits [C, V], or what is known of them


class Work(NamedTuple):
    """Buffers that chunks share on a CPU: logits [C, V] of student and teacher, and [CROSS_ROWS, V]."""

    student: Tensor
    teacher: Tensor
    spare: Tensor


class LossRows(NamedTuple):
    """The scalar loss, which alone carries gradients, and float32[N] rows: nats, nats, 0 or 1; 0 where weight is 0."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agree: Tensor


def kd_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | None, teacher_head: Head | SparseHead | None,
    targets: Tensor, weight: Tensor, objective: Objective, loss_tokens: float, chunk_tokens: int,
    train_head: bool, vocab: int = 0, dtype: torch.dtype = torch.float32,
) -> LossRows:
    """The loss of hidden states [N, D] and [N, Dt], targets int[N] and weights [N], as the module's formula says.

    Differentiable in student_hidden, and in student_weight [V, D] where `train_head`; backward may run once. Both heads are
    cut to their first `vocab` ids (0: all of the student's). With a `SparseHead` there are no
    teacher_hidden. Without a teacher kd and agree are 0, and the objective's
    kd_weight must be 0. `dtype` is what products take on CUDA; sums and logits are float32 everywhere.
    """
    divisor = loss_tokens or 1.0  # nothing supervised: 0, not 0 / 0
    walk = _Walk(teacher_hidden, teacher_head, targets, weight, objective, divisor, chunk_tokens, vocab, dtype)
    return LossRows(*_SavedGradients.apply(walk, student_hidden, student_weight if train_head else student_weight.detach()))


@torch.no_grad()
def score_rows(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | None, teacher_head: Head | SparseHead | None,
    targets: Tensor, weight: Tensor, objective: Objective, chunk_tokens: int, vocab: int = 0, dtype: torch.dtype = torch.float32,
) -> LossRows:
    """The same rows with no gradient work; `loss` is the weighted sum, divided by nothing."""
    walk = _Walk(teacher_hidden, teacher_head, targets, weight, objective, 1.0, chunk_tokens, vocab, dtype)
    rows, _, _ = walk(student_hidden, student_weight, False, False)
    return rows


class _SavedGradients(torch.autograd.Function):
    """Runs a walk, keeps the gradients that it made, and scales them when they are asked for."""

    @staticmethod
    def forward(ctx, walk: "_Walk", hidden: Tensor, head_weight: Tensor) -> LossRows:
        rows, *gradients = walk(hidden, head_weight, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.set_materialize_grads(False)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor, *_) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else gradient.mul_(slope) for gradient in ctx.saved_tensors)


@dataclass(frozen=True)
class _Walk:
    """The walk over chunks; called with the two arrays that may carry gradients and whether they do."""

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
    def __call__(self, hidden: Tensor, head_weight: Tensor, train_hidden: bool, train_head: bool) -> tuple:
        """(rows, gradient of the hidden states, gradient of the head); a gradient that is not asked for is None."""
        matrix = head_weight[: self.vocab or len(head_weight)]
        matrix = matrix.to(self.dtype) if matrix.is_cuda else matrix
        count = len(hidden)
        size = even_chunk(count, self.chunk_tokens)  # a small last one costs nearly as much
        heights = (size, size if self.teacher_hidden is not None else 0, min(size, CROSS_ROWS))
        work = None if matrix.is_cuda else Work(*(torch.empty((height, len(matrix))) for height in heights))
        hidden_grad = torch.empty_like(hidden) if train_hidden else None
        head_grad = torch.empty(head_weight.shape, device=hidden.device) if train_head else None
        columns = []
        for start in range(0, count, size):
            place = slice(start, start + size)
            inputs, slope, rows = self._chunk(hidden, matrix, place, work, train_hidden or train_head)
            columns.append(rows)
            if train_hidden:
                hidden_grad[place] = _product(slope, matrix)
            if train_head:
                _add_product(head_grad[: len(matrix)], slope.T, inputs, first=start == 0)
        loss, kd, ce, agree = (torch.cat(column) for column in zip(*columns, strict=True))
        if train_head:
            head_grad[len(matrix) :] = 0  # of a head that is cut
            head_grad = head_grad.to(head_weight.dtype)
        return LossRows(loss.sum(), kd, ce, agree), hidden_grad, head_grad

    def _chunk(self, hidden: Tensor, matrix: Tensor, place: slice, work: Work | None, wants_slope: bool) -> tuple:
        """(inputs [C, D], d loss / d logits [C, V], (weighted loss, kd, ce, agree) [C] each); the slope may lie in `work`."""
        weight = self.weight[place, None].float()
        live = weight != 0
        inputs = torch.where(live, hidden[place], 0).to(torch.float32 if work else self.dtype)  # dead rows may hold NaN
        logits, answers = _project(inputs, matrix, work and work.student[: len(inputs)]), None
        if self.teacher_hidden is not None:
            teacher_hidden = torch.where(live, self.teacher_hidden[place], 0)
            teacher_hidden = teacher_hidden.float() if work else teacher_hidden
            answers = self.teacher_head.logits(teacher_hidden, len(matrix), work and work.teacher[: len(inputs)])
        elif self.teacher_head is not None:
            answers = self.teacher_head.rows(place)
        targets, share = self.targets[place, None].long(), weight / self.loss_tokens
        if work:
            slope, kd, ce, agree = _cross_by_rows(logits, answers, work.spare, targets, share, self.objective, wants_slope)
        else:
            at_once = _cross_at_once if isinstance(answers, SparseHead) else _compiled(_cross_at_once)
            slope, kd, ce, agree = at_once(logits, answers, targets, share, self.objective, wants_slope, self.dtype)
        loss = (self.objective.kd_weight * kd + (1 - self.objective.kd_weight) * ce) * share
        return inputs, slope, tuple(torch.where(live, column, 0)[:, 0] for column in (loss, kd, ce, agree))


def _cross_by_rows(
    logits: Tensor, answers: Answers, spare: Tensor, targets: Tensor, share: Tensor, objective: Objective, wants_slope: bool
) -> tuple[Tensor, ...]:
    """(`share` of the slope, which replaces the logits, kd, ce, agree): as many rows at once as `spare` has."""
    columns = []
    for start in range(0, len(logits), len(spare)):
        rows = slice(start, start + len(spare))
        z, t = logits[rows], _rows_of(answers, rows)
        slope, *column = _cross(z, t, spare[: len(z)], targets[rows], objective, wants_slope)
        columns.append(column)
        if wants_slope:
            torch.mul(slope, share[rows], out=z)
    return logits, *map(torch.cat, zip(*columns, strict=True))


def _rows_of(answers: Answers, rows: slice) -> Answers:
    if answers is None:
        return None
    return answers.rows(rows) if isinstance(answers, SparseHead) else answers[rows]


def _cross_at_once(
    logits: Tensor, answers: Answers, targets: Tensor, share: Tensor, objective: Objective, wants_slope: bool, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The same over all rows, the slope in `dtype`. What is overwritten are copies: compiled, they are never made."""
    answers = answers.clone() if isinstance(answers, Tensor) else answers
    slope, *column = _cross(logits.clone(), answers, torch.empty_like(logits), targets, objective, wants_slope)
    return slope.mul(share).to(dtype) if wants_slope else None, *column


def _cross(
    z: Tensor, t: Answers, spare: Tensor, targets: Tensor, objective: Objective, wants_slope: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Logits [C, V] of student and teacher, both overwritten, and a spare buffer → (d loss / d z in one of them, kd, ce, agree)."""
    if isinstance(t, SparseHead):
        return _cross_sparse(z, t, spare, targets, objective, wants_slope)
    kd = agree = z.new_zeros((len(z), 1))
    z.clamp_(min=FLOOR)
    if t is not None:
        t.clamp_(min=FLOOR)
        agree = (_most_likely(z) == _most_likely(t)).float()
    temperature, kd_weight = objective.temperature, objective.kd_weight
    plain = z if temperature == 1 else z.clone()
    if temperature != 1 and t is not None:
        z.div_(temperature), t.div_(temperature)
    if temperature != 1 or t is None:
        u_plain = _log_softmax(plain, torch.empty_like(plain) if t is not None else spare)
        ce = -u_plain.gather(1, targets)
    slope = None
    if t is not None:
        u = _log_softmax(z, spare)
        ce = -u.gather(1, targets) if temperature == 1 else ce
        v = _log_softmax(t, z)
        ce_share = 1 - kd_weight if temperature == 1 else 0.0
        scale = kd_weight * objective.divergence_scale / temperature
        kd, slope = _DIVERGENCES[objective.divergence](u, v, t, objective.jsd_beta, scale, ce_share, wants_slope)
        kd = kd * objective.divergence_scale
    if not wants_slope:
        return None, kd, ce, agree
    if kd_weight < 1 and (t is None or temperature != 1):
        plain = u_plain.exp_().mul_(1 - kd_weight)
        slope = plain if slope is None else slope.add_(plain)
    if kd_weight < 1:
        _subtract_at(slope, targets, 1 - kd_weight)
    return slope, kd, ce, agree


def _cross_sparse(
    z: Tensor, teacher: SparseHead, spare: Tensor, targets: Tensor, objective: Objective, wants_slope: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """`_cross` where the teacher is K ids and the log of the rest: both are compared over K + 1 outcomes.

    The last outcome's logit is the log-sum-exp of all other ids, so its slope is shared among them by their softmax.
    """
    known, ids = teacher.ids >= 0, teacher.ids.clamp(min=0).long()
    z.clamp_(min=FLOOR)
    agree = (_most_likely(z) == teacher.top[:, None]).float()
    target_logit, kept = z.gather(1, targets), torch.where(known, z.gather(1, ids), FLOOR)
    others = z.scatter_add_(1, ids, torch.where(known, FLOOR, 0.0))
    share = _log_softmax(others, spare)
    rest = others.amax(1, keepdim=True) - share.amax(1, keepdim=True)
    outcomes = torch.cat([kept, rest], 1)
    answers = torch.cat([teacher.log_probs, teacher.tail[:, None]], 1).clamp_(min=FLOOR)
    ce = outcomes.logsumexp(1, keepdim=True) - target_logit
    u, v = outcomes.log_softmax(1), answers.log_softmax(1)
    kd_weight = objective.kd_weight
    divergence = _DIVERGENCES[objective.divergence]
    kd, slope = divergence(u, v, torch.empty_like(u), objective.jsd_beta, kd_weight, 1 - kd_weight, wants_slope)
    kd = kd + teacher.offset[:, None]
    if not wants_slope:
        return None, kd, ce, agree
    everywhere = share.exp_().mul_(slope[:, -1:])
    everywhere.scatter_add_(1, ids, torch.where(known, slope[:, :-1], 0.0))
    everywhere.scatter_add_(1, targets, kd_weight - 1 + torch.zeros_like(ce))
    return everywhere, kd, ce, agree


# Each takes log-probabilities u of the student and v of the teacher and a spare buffer, all overwritten, and returns the
# divergence [C, 1] and, if wanted, `scale` times its slope in u plus `ce` times the student's probabilities, [C, V].


def _forward_kl(u: Tensor, v: Tensor, spare: Tensor, beta: float, scale: float, ce: float, wants_slope: bool) -> tuple:
    """Σ t (log t - log s); slope s - t."""
    difference = torch.sub(v, u, out=spare)
    teacher = v.exp_()
    value = _row_dot(teacher, difference, difference)
    if not wants_slope:
        return value, None
    student = u.exp_()
    return value, (student if scale + ce == 1 else student.mul_(scale + ce)).sub_(teacher, alpha=scale)


def _reverse_kl(u: Tensor, v: Tensor, spare: Tensor, beta: float, scale: float, ce: float, wants_slope: bool) -> tuple:
    """Σ s (log s - log t); slope s (log s/t - KL)."""
    difference = torch.sub(u, v, out=spare)
    student = u.exp_()
    value = _row_dot(student, difference, v)
    return value, difference.sub_(value).mul_(scale).add_(ce).mul_(student) if wants_slope else None


def _jsd(u: Tensor, v: Tensor, spare: Tensor, beta: float, scale: float, ce: float, wants_slope: bool) -> tuple:
    """β Σ t log t/m + (1-β) Σ s log s/m, m = β t + (1-β) s; slope (1-β) s (log s/m - KL(s‖m)).

    log s/m = -log(1 + β (e^d - 1)) with d = log t/s, and the mirror image of that where d > 0: nothing is subtracted that is nearly
    equal, though s and t may be.
    """
    d = torch.sub(v, u, out=spare)
    student, teacher = u.exp_(), v.exp_()
    above, distance = d > 0, d.abs().neg_()
    nearer = torch.where(above, 1 - beta, beta).mul_(distance.expm1()).log1p_().neg_()  # log of the more likely one's ratio to m
    further = distance.add_(nearer)
    student_term, teacher_term = torch.where(above, further, nearer), torch.where(above, nearer, further)
    student_kl = _row_dot(student, student_term, further)
    value = beta * _row_dot(teacher, teacher_term, teacher_term) + (1 - beta) * student_kl
    slope = student_term.sub_(student_kl).mul_((1 - beta) * scale).add_(ce).mul_(student) if wants_slope else None
    return value, slope


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


@cache
def _compiled(function: Callable) -> Callable:
    """Fused kernels, where the installed torch can make them; what runs eagerly is the same, more slowly."""
    torch._dynamo.config.suppress_errors = True  # no compiler on this machine: run eagerly
    return torch.compile(function)


def _log_softmax(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten._log_softmax.out(x, 1, False, out=out)


def _most_likely(logits: Tensor) -> Tensor:
    """The first most likely id of each row, int64[C, 1].

    A CPU's argmax takes four times as long as its amax: the maxima of ranges of ids say which range to search.
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


def _subtract_at(slope: Tensor, targets: Tensor, amount: float) -> None:
    """`amount` less at one id of each row; a compiler fuses the comparison, while scattering would have it write [C, V] and read it."""
    if torch.compiler.is_compiling():
        slope.sub_((torch.arange(slope.shape[1], device=slope.device) == targets).to(slope.dtype), alpha=amount)
    else:
        slope.scatter_add_(1, targets, slope.new_full((len(slope), 1), -amount))


def _row_dot(x: Tensor, y: Tensor, work: Tensor) -> Tensor:
    """[C, 1]; the products are left in `work`, which may be x or y."""
    return torch.mul(x, y, out=work).sum(1, keepdim=True)


def _project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 hidden @ weight.T, [C, V]; both in one half-precision type on CUDA are summed in float32."""
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
    """float32 left @ right; where `right` is in half precision on CUDA `left` is rounded to it, and promoted by block on a CPU.

    Few rows are multiplied by block in float32 too: a CPU's BLAS adds a whole vocabulary one after the other for them.
    """
    if right.dtype == torch.float32 and (left.is_cuda or len(left) > FEW_ROWS):
        return left @ right
    if left.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    size = BLOCK_ROWS if len(left) > FEW_ROWS else max(1, BLOCK_ROWS // 8)
    return sum(left[:, start : start + size] @ right[start : start + size].float() for start in range(0, len(right), size))


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, in place; the first one replaces what `total` holds."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(_product(left, right))
    else:
        total += _product(left, right)
