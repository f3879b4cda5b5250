"""The terms of the loss on MLX where only K of the teacher's ids are known, and the log of the rest.

In and out as in `dense.py`. Student and teacher are compared over K + 1 outcomes, the last being
"any other id". Axes: `C` positions per chunk, `K` kept teacher tokens.
"""

import mlx.core as mx

from mlx_distill.backends.mlx.decoupled import Decoupled
from mlx_distill.backends.mlx.divergences import divergence_of
from mlx_distill.backends.mlx.heads import FLOOR, SparseHead
from mlx_distill.backends.mlx.terms import Logits, Terms
from mlx_distill.backends.mlx.vocabulary import Blocks, MostLikely, Picked, Softmax, add_at, floor
from mlx_distill.objective import Objective


def against_some_ids(
    student_logits: Logits,
    teacher: SparseHead,
    targets: mx.array,
    blocks: Blocks,
    objective: Objective,
) -> Terms:
    """The last outcome's logit is the log-sum-exp of all other ids, so its gradient is shared among
    them by their softmax. With the student's K logits it also gives the cross-entropy.
    """
    others, choice = Softmax(), MostLikely()
    target_logit, known = Picked(targets), Picked(teacher.ids)
    done: list[mx.array] = []
    for start, stop in blocks:
        z = student_logits(start, stop, done)
        choice.add(z, start)
        done = [*target_logit.add(z, start), *known.add(z, start), *choice.best]
        rest = add_at(z, teacher.ids, start, FLOOR)
        done += others.add(rest, rest.max(axis=1, keepdims=True))
    others.close()
    outcomes = mx.concatenate([known.logits, others.top + others.log_sum], axis=1)
    teacher_outcomes = floor(mx.concatenate([teacher.log_probs, teacher.tail[:, None]], axis=1))
    student_softmax = _softmax(outcomes)
    if objective.divergence == "dkd":
        known_target = mx.argmax(teacher.ids == targets, axis=1, keepdims=True)
        decoupled = Decoupled(known_target, objective)
        decoupled.add(outcomes, teacher_outcomes, 0)
        kd, of_outcomes = decoupled.close(), decoupled.gradient
    else:
        teacher_softmax, divergence = _softmax(teacher_outcomes), divergence_of(objective)
        divergence.add(student_softmax, teacher_softmax, outcomes, teacher_outcomes)
        kd, of_outcomes = divergence.close(student_softmax, teacher_softmax), divergence.gradient
    kd = kd + teacher.offset[:, None]

    def gradient(block: int, share: mx.array) -> mx.array:
        found = of_outcomes(0, objective.kd_weight * share, (1 - objective.kd_weight) * share)
        everywhere = others.kept[block] * (found[:, -1:] * others.scales[block])
        return add_at(everywhere, teacher.ids, blocks[block][0], found[:, :-1])

    agree = (choice.id == teacher.top[:, None]).astype(mx.float32)
    return Terms(kd, student_softmax.minus_log(target_logit.logits), agree, gradient)


def _softmax(logits: mx.array) -> Softmax:
    """Of all outcomes, which are one block."""
    softmax = Softmax()
    softmax.add(logits, logits.max(axis=1, keepdims=True))
    softmax.close()
    return softmax
