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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mlx_distill.backends.chunks import even_chunk, torch_rows
from mlx_distill.backends.torch.dense import against_logits, against_nothing
from mlx_distill.backends.torch.heads import FLOOR, Head, SparseHead
from mlx_distill.backends.torch.products import add_product, product, project
from mlx_distill.backends.torch.sparse import against_some_ids
from mlx_distill.objective import Objective

# the teacher's logits [C, V], or what is known of them
TeacherOutputs: TypeAlias = Tensor | SparseHead | None


class Work(NamedTuple):
    """Buffers that chunks share on a CPU: logits [C, V] of student and teacher, and of
    a few rows.
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

    @property
    def terms(self) -> dict[str, Tensor]:
        """The rows by name."""
        return {"kd": self.kd, "ce": self.ce, "agree": self.agree}


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
    taught: int | None = None,
) -> LossRows:
    """The loss of hidden states [N, D] and [N, Dt], targets int[N] and weights [N], as the module's
    formula says.

    Differentiable in student_hidden, and in student_weight [V, D] where `train_head`; backward may
    run once. Both heads are cut to their first `vocab` ids (0: all of the student's). With a
    `SparseHead` there are no teacher_hidden. Without a teacher kd and agree are 0, and the
    objective's kd_weight must be 0. What the teacher says is of the first `taught` positions
    (None: of all); at the others the loss is the cross-entropy alone. `dtype` is what products take
    on CUDA; sums and logits are float32 everywhere.
    """
    loss_tokens = loss_tokens or 1.0  # nothing supervised: 0, not 0 / 0
    walk = _Walk(
        teacher_hidden,
        teacher_head,
        targets,
        weight,
        objective,
        loss_tokens,
        chunk_tokens,
        vocab,
        dtype,
        taught,
    )
    trained = student_weight if train_head else student_weight.detach()
    return LossRows(*_SavedGradients.apply(walk, student_hidden, trained))


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
    taught: int | None = None,
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
        vocab,
        dtype,
        taught,
    )
    rows, _, _ = walk(student_hidden, student_weight, False, False)
    return rows


class _SavedGradients(torch.autograd.Function):
    """Runs a walk, keeps the gradients that it made, and scales them when they are asked for."""

    @staticmethod
    def forward(ctx: Any, walk: "_Walk", hidden: Tensor, head_weight: Tensor) -> LossRows:
        rows, *gradients = walk(
            hidden, head_weight, ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.set_materialize_grads(False)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
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
    taught: int | None

    @torch.no_grad()
    def __call__(
        self, hidden: Tensor, head_weight: Tensor, train_hidden: bool, train_head: bool
    ) -> tuple:
        """(rows, gradient of the hidden states, gradient of the head); a gradient that is not asked
        for is None.
        """
        matrix = head_weight[: self.vocab or len(head_weight)]
        matrix = matrix.to(self.dtype) if matrix.is_cuda else matrix
        places = list(self._places(len(hidden)))
        size = max(place.stop - place.start for place in places)
        work = None if matrix.is_cuda else self._work(size, len(matrix))
        hidden_grad = torch.empty_like(hidden) if train_hidden else None
        head_grad = torch.empty(head_weight.shape, device=hidden.device) if train_head else None
        rows = []
        for place in places:
            inputs, gradient, columns = self._chunk(
                hidden, matrix, place, work, train_hidden or train_head
            )
            rows.append(columns)
            if hidden_grad is not None:
                hidden_grad[place] = product(gradient, matrix)
            if head_grad is not None:
                add_product(head_grad[: len(matrix)], gradient.T, inputs, first=place.start == 0)
        loss, kd, ce, agree = (torch.cat(column) for column in zip(*rows, strict=True))
        if head_grad is not None:
            head_grad[len(matrix) :] = 0  # of a head that is cut
            head_grad = head_grad.to(head_weight.dtype)
        return LossRows(loss.sum(), kd, ce, agree), hidden_grad, head_grad

    def _places(self, count: int) -> Iterator[slice]:
        """The chunks: none holds positions of which the teacher says something and others."""
        taught = count if self.taught is None else self.taught
        for first, last in ((0, taught), (taught, count)):
            if first < last:  # a small last chunk costs nearly as much as a whole one
                size = even_chunk(last - first, self.chunk_tokens)
                for start in range(first, last, size):
                    yield slice(start, min(start + size, last))

    def _work(self, size: int, vocab: int) -> Work:
        teacher = size if self.teacher_hidden is not None else 0
        rows = torch_rows(vocab, torch.get_num_threads())
        heights = (size, teacher, min(size, rows))
        return Work(*(torch.empty((height, vocab)) for height in heights))

    def _chunk(
        self, hidden: Tensor, matrix: Tensor, place: slice, work: Work | None, wants_gradient: bool
    ) -> tuple:
        """(inputs [C, D], d loss / d logits [C, V], (weighted loss, kd, ce, agree) [C] each); the
        gradient may lie in `work`.
        """
        weight = self.weight[place, None].float()
        inputs = _supervised(weight, hidden[place]).to(torch.float32 if work else self.dtype)
        logits = project(inputs, matrix, work and work.student[: len(inputs)])
        teacher = self._teacher_outputs(place, weight, len(matrix), work)
        targets, share = self.targets[place, None].long(), weight / self.loss_tokens
        objective = self.objective.text_alone if self._alone(place) else self.objective
        arguments = (targets, share, objective, wants_gradient)
        if work:
            gradient, kd, ce, agree = _by_rows(logits, teacher, work.spare, *arguments)
        else:
            at_once = _at_once if isinstance(teacher, SparseHead) else _compiled(_at_once)
            gradient, kd, ce, agree = at_once(logits, teacher, *arguments, self.dtype)
        loss = (objective.kd_weight * kd + (1 - objective.kd_weight) * ce) * share
        columns = (loss, kd, ce, agree)
        return inputs, gradient, tuple(_supervised(weight, column)[:, 0] for column in columns)

    def _alone(self, place: slice) -> bool:
        """Whether the teacher says nothing of a chunk."""
        return self.taught is not None and place.start >= self.taught

    def _teacher_outputs(
        self, place: slice, weight: Tensor, vocab: int, work: Work | None
    ) -> TeacherOutputs:
        if self._alone(place):
            return None
        if self.teacher_head is None or isinstance(self.teacher_head, SparseHead):
            return _rows_of(self.teacher_head, place)
        assert self.teacher_hidden is not None  # a head is of no use without them
        hidden = _supervised(weight, self.teacher_hidden[place])
        if work is None:
            return self.teacher_head.logits(hidden, vocab)
        return self.teacher_head.logits(hidden.float(), vocab, work.teacher[: len(hidden)])


def _supervised(weight: Tensor, x: Tensor) -> Tensor:
    """x with 0 in rows of weight 0, which may hold anything, even NaN."""
    return torch.where(weight != 0, x, 0)


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
    return None if gradient is None else gradient.mul(share).to(dtype), *column


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
        return against_nothing(z, spare, targets, 1 - objective.kd_weight, wants_gradient)
    if isinstance(teacher, SparseHead):
        return against_some_ids(z, teacher, spare, targets, objective, wants_gradient)
    return against_logits(z, teacher, spare, targets, objective, wants_gradient)


@cache
def _compiled(function: Callable) -> Callable:
    """One for each function; torch's compiler is imported where it is first needed."""
    from mlx_distill.backends.torch.compiled import Compiled

    return Compiled(function)
