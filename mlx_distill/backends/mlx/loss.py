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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distill.backends.chunks import mlx_chunk
from mlx_distill.backends.mlx.decoupled import against_logits_apart
from mlx_distill.backends.mlx.dense import against_logits, against_nothing
from mlx_distill.backends.mlx.heads import Head, SparseHead
from mlx_distill.backends.mlx.sparse import against_some_ids
from mlx_distill.backends.mlx.terms import Terms
from mlx_distill.backends.mlx.vocabulary import Blocks, add_at, after, blocks_of, floor
from mlx_distill.objective import Objective


class LossRows(NamedTuple):
    """The scalar loss, which alone carries gradients, and float32[N] rows: nats, nats, 0 or 1; 0
    where weight is 0.
    """

    loss: mx.array
    kd: mx.array
    ce: mx.array
    agree: mx.array

    @property
    def terms(self) -> dict[str, mx.array]:
        """The rows by name."""
        return {"kd": self.kd, "ce": self.ce, "agree": self.agree}


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
    taught: int | None = None,
) -> LossRows:
    """The loss of hidden states [N, D] and [N, Dt], targets int[N] and weights [N], as the module's
    formula says.

    Differentiable in student_hidden, and in student_weight [V, D] where `train_head` (it is a
    constant otherwise). Both heads are cut to their first `vocab` ids (0: all of the student's).
    With a `SparseHead` there are no teacher_hidden. Without a teacher kd and agree are 0, and the
    objective's kd_weight must be 0. What the teacher says is of the first `taught` positions (None:
    of all); at the others the loss is the cross-entropy alone. Targets must be below `vocab`: MLX
    does not check indices.
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
        train_head,
        vocab,
        taught,
    )
    if train_head:
        outputs = _with_saved_gradients(walk)(student_hidden, student_weight)
    else:
        frozen = _with_saved_gradients(lambda hidden: walk(hidden, student_weight))
        outputs = frozen(student_hidden)
    return LossRows(*outputs[:4])


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
    taught: int | None = None,
) -> LossRows:
    """The same rows with no gradient work; `loss` is the weighted sum, divided by nothing."""
    walk = _Walk(
        teacher_hidden,
        teacher_head,
        targets,
        weight,
        objective,
        loss_tokens=1.0,
        chunk_tokens=chunk_tokens,
        train_head=False,
        vocab=vocab,
        taught=taught,
        gradients=False,
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
    def saved(primals: Any, cotangents: Any, outputs: Any) -> Any:
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
    taught: int | None
    gradients: bool = True

    def __call__(self, hidden: mx.array, head_weight: mx.array) -> tuple[mx.array, ...]:
        """(loss, kd, ce, agree), and the gradients of the hidden states and the head that are asked
        for.
        """
        vocab = self.vocab or head_weight.shape[0]
        blocks = blocks_of(vocab, min(self._most, hidden.shape[0]), self._splits)
        rows, hidden_grads = [], []
        head_grads: list[mx.array] = []
        done: list[mx.array] = []
        for place in self._places(hidden.shape[0]):
            chunk = self._chunk(hidden, place, done)
            terms = self._first_pass(chunk, head_weight, blocks)
            rows.append(self._rows(chunk, terms))
            done = list(rows[-1])
            if self.gradients:
                hidden_grad, head_grads = self._second_pass(
                    chunk, terms, head_weight, blocks, head_grads
                )
                hidden_grads.append(hidden_grad.astype(hidden.dtype))
                done = [hidden_grads[-1], *rows[-1], *head_grads]
        loss, *columns = [mx.concatenate(column) for column in zip(*rows, strict=True)]
        outputs = [loss.sum(), *columns]
        if self.gradients:
            outputs.append(mx.concatenate(hidden_grads))
        if self.gradients and self.train_head:
            outputs.append(_whole(head_grads, head_weight))
        return tuple(outputs)

    def _places(self, count: int) -> Iterator[slice]:
        """The chunks: none holds positions of which the teacher says something and others."""
        taught = count if self.taught is None else self.taught
        for first, last in ((0, taught), (taught, count)):
            for start in range(first, last, self._most):
                yield slice(start, min(start + self._most, last))

    @property
    def _most(self) -> int:
        """Positions of a chunk."""
        return mlx_chunk(self.chunk_tokens, self.objective.divergence)

    @property
    def _splits(self) -> bool:
        """Whether a block of the vocabulary costs only its share."""
        head = self.teacher_head
        return head is None or isinstance(head, SparseHead) or head.splits

    def _chunk(self, hidden: mx.array, place: slice, done: list[mx.array]) -> "_Chunk":
        """C positions, once `done` is computed."""
        weight = after(self.weight[place, None].astype(mx.float32), done)
        inputs = _supervised(weight, hidden[place])
        alone = self.taught is not None and place.start >= self.taught
        objective = self.objective.text_alone if alone else self.objective
        teacher = None if alone else self.teacher_head
        targets = self.targets[place, None].astype(mx.int32)
        return _Chunk(place, inputs, targets, weight, objective, teacher)

    def _first_pass(self, chunk: "_Chunk", head_weight: mx.array, blocks: Blocks) -> Terms:
        """The logits of a chunk, and what its positions are told by them."""

        def student_logits(start: int, stop: int, done: list[mx.array]) -> mx.array:
            return floor(after(chunk.inputs, done) @ _promoted(head_weight, start, stop).T)

        head, arguments = chunk.teacher_head, (chunk.targets, blocks, chunk.objective)
        if head is None:
            return against_nothing(student_logits, *arguments)
        if isinstance(head, SparseHead):
            teacher = SparseHead(*(column[chunk.place] for column in head))
            return against_some_ids(student_logits, teacher, *arguments)
        assert self.teacher_hidden is not None  # a head is of no use without them
        teacher_inputs = _supervised(chunk.weight, self.teacher_hidden[chunk.place])

        def teacher_logits(start: int, stop: int, done: list[mx.array]) -> mx.array:
            return floor(head.logits(after(teacher_inputs, done), start, stop))

        apart = chunk.objective.divergence == "dkd"
        against = against_logits_apart if apart else against_logits
        return against(student_logits, teacher_logits, *arguments)

    def _rows(self, chunk: "_Chunk", terms: Terms) -> tuple[mx.array, ...]:
        """(weight * loss / loss_tokens, kd, ce, agree), each [C]."""
        kd_weight = chunk.objective.kd_weight
        loss = kd_weight * terms.kd + (1 - kd_weight) * terms.ce
        columns = (loss * (chunk.weight / self.loss_tokens), terms.kd, terms.ce, terms.agree)
        return tuple(mx.where(chunk.weight != 0, column, 0)[:, 0] for column in columns)

    def _second_pass(
        self,
        chunk: "_Chunk",
        terms: Terms,
        head_weight: mx.array,
        blocks: Blocks,
        head_grads: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """d loss / d hidden [C, D], and `head_grads` (a block each; empty at first) with this
        chunk's part added.
        """
        hidden_grad, new_head_grads = mx.zeros_like(chunk.inputs), []
        done: list[mx.array] = []
        for block, (start, stop) in enumerate(blocks):
            share = after(chunk.weight / self.loss_tokens, done)
            gradient = terms.gradient(block, share)
            if chunk.objective.needs_targets:
                ce_share = (1 - chunk.objective.kd_weight) * share
                gradient = add_at(gradient, chunk.targets, start, -ce_share)
            hidden_grad = mx.addmm(hidden_grad, gradient, _promoted(head_weight, start, stop))
            done = [hidden_grad]
            if self.train_head:
                product = (gradient.T, chunk.inputs)
                new_head_grads.append(
                    mx.addmm(head_grads[block], *product) if head_grads else mx.matmul(*product)
                )
                done.append(new_head_grads[-1])
        return hidden_grad, new_head_grads


class _Chunk(NamedTuple):
    """C positions: their place, hidden states [C, D], targets [C, 1] and weights [C, 1], and what
    they are to learn.
    """

    place: slice
    inputs: mx.array
    targets: mx.array
    weight: mx.array
    objective: Objective
    teacher_head: Head | SparseHead | None


def _supervised(weight: mx.array, hidden: mx.array) -> mx.array:
    """The hidden states in float32; rows of weight 0, which may hold anything, even NaN, as 0."""
    return mx.where(weight != 0, hidden.astype(mx.float32), 0)


def _promoted(head_weight: mx.array, start: int, stop: int) -> mx.array:
    return head_weight[start:stop].astype(mx.float32)


def _whole(head_grads: list[mx.array], head_weight: mx.array) -> mx.array:
    """The head's gradient [V, D] from that of each block; 0 for ids that were cut off."""
    blocks = [block.astype(head_weight.dtype) for block in head_grads]
    cut_off = head_weight.shape[0] - sum(len(block) for block in blocks)
    return mx.concatenate([*blocks, mx.zeros((cut_off, head_weight.shape[1]), head_weight.dtype)])
