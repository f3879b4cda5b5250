"""The terms of the loss on MLX where the teacher's logits are all there, or there is no teacher.

In: functions that compute a block of logits of C positions, the targets and the objective. Out: what
the positions are told, and the way to the gradient with respect to each block's logits. One pass
over the vocabulary makes the logits; what a gradient needs of them is kept. Axes: `C` positions per
chunk.
"""

import mlx.core as mx

from mlx_distill.backends.mlx.divergences import divergence_of
from mlx_distill.backends.mlx.terms import Logits, Terms
from mlx_distill.backends.mlx.vocabulary import Blocks, MostLikely, Picked, Softmax
from mlx_distill.objective import Objective


def against_nothing(
    student_logits: Logits, targets: mx.array, blocks: Blocks, objective: Objective
) -> Terms:
    """Without a teacher: the cross-entropy alone."""
    softmax, target_logit = Softmax(), Picked(targets)
    done: list[mx.array] = []
    for start, stop in blocks:
        z = student_logits(start, stop, done)
        done = [*target_logit.add(z, start), *softmax.add(z, z.max(axis=1, keepdims=True))]
    softmax.close()
    nothing = mx.zeros(targets.shape)

    def gradient(block: int, share: mx.array) -> mx.array:
        return softmax.kept[block] * ((1 - objective.kd_weight) * share * softmax.scales[block])

    return Terms(nothing, softmax.minus_log(target_logit.logits), nothing, gradient)


def against_logits(
    student_logits: Logits,
    teacher_logits: Logits,
    targets: mx.array,
    blocks: Blocks,
    objective: Objective,
) -> Terms:
    """Against all of the teacher's logits: the divergence at the objective's temperature, the
    cross-entropy at 1.
    """
    temperature, shared = objective.temperature, objective.temperature == 1
    plain, teacher = Softmax(), Softmax()
    student = plain if shared else Softmax()  # one softmax serves both terms
    divergence = divergence_of(objective)
    target_logit, choice, teacher_choice = Picked(targets), MostLikely(), MostLikely()
    done: list[mx.array] = []
    for start, stop in blocks:
        z = student_logits(start, stop, done)
        t = teacher_logits(start, stop, [z])
        top, teacher_top = choice.add(z, start), teacher_choice.add(t, start)
        done = [*target_logit.add(z, start), *plain.add(z, top), *choice.best, *teacher_choice.best]
        if not shared:
            z, top = z / temperature, top / temperature
            t, teacher_top = t / temperature, teacher_top / temperature
            done += student.add(z, top)
        done += teacher.add(t, teacher_top)
        done += divergence.add(student, teacher, z, t)
    for softmax in (plain, teacher) if shared else (plain, student, teacher):
        softmax.close()
    kd = objective.divergence_scale * divergence.close(student, teacher)
    weight = objective.kd_weight * objective.divergence_scale / temperature

    def gradient(block: int, share: mx.array) -> mx.array:
        ce_share = (1 - objective.kd_weight) * share
        found = None
        if objective.needs_teacher:
            also = ce_share if shared else mx.zeros_like(share)
            found = divergence.gradient(block, weight * share, also)
        if objective.needs_targets and not (shared and objective.needs_teacher):
            of_ce = plain.kept[block] * (ce_share * plain.scales[block])
            found = of_ce if found is None else found + of_ce
        return found

    agree = (choice.id == teacher_choice.id).astype(mx.float32)
    return Terms(kd, plain.minus_log(target_logit.logits), agree, gradient)
