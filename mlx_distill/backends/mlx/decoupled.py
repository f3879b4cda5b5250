"""The terms of the loss on MLX under decoupled distillation, which asks for the target.

In and out as in `dense.py`. Decided here: the target is taken out of both logits before their
softmax, so that what all other ids have together is exact where the target has nearly all. The
definition is `mlx_distill/divergences.py`'s `dkd`. Axes: `C` positions per chunk.
"""

import mlx.core as mx

from mlx_distill.backends.mlx.heads import FLOOR
from mlx_distill.backends.mlx.terms import Logits, Terms
from mlx_distill.backends.mlx.vocabulary import (
    Blocks,
    MostLikely,
    Picked,
    Softmax,
    add_at,
    blend,
    row_dot,
)
from mlx_distill.objective import Objective


def against_logits_apart(
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
    plain, plain_logit = Softmax(), Picked(targets)  # where the temperature is another one
    decoupled = Decoupled(targets, objective)
    choice, teacher_choice = MostLikely(), MostLikely()
    done: list[mx.array] = []
    for start, stop in blocks:
        z = student_logits(start, stop, done)
        t = teacher_logits(start, stop, [z])
        top = choice.add(z, start)
        teacher_choice.add(t, start)
        done = [*choice.best, *teacher_choice.best]
        if not shared:
            done += [*plain.add(z, top), *plain_logit.add(z, start)]
            z, t = z / temperature, t / temperature
        done += decoupled.add(z, t, start)
    kd = objective.divergence_scale * decoupled.close()
    if shared:
        ce = -decoupled.log_s
    else:
        plain.close()
        ce = plain.minus_log(plain_logit.logits)
    weight = objective.kd_weight * objective.divergence_scale / temperature

    def gradient(block: int, share: mx.array) -> mx.array:
        ce_share = (1 - objective.kd_weight) * share
        also = ce_share if shared else mx.zeros_like(share)
        found = decoupled.gradient(block, weight * share, also)
        if objective.needs_targets and not shared:
            found = found + plain.kept[block] * (ce_share * plain.scales[block])
        return found

    agree = (choice.id == teacher_choice.id).astype(mx.float32)
    return Terms(kd, ce, agree, gradient)


class Decoupled:
    """The divergence, met block by block; targets [C, 1] are ids, or columns of the only block."""

    def __init__(self, targets: mx.array, objective: Objective) -> None:
        self.targets = targets
        self.target, self.rest = objective.dkd_target, objective.dkd_rest
        self.logit, self.teacher_logit = Picked(targets), Picked(targets)
        self.student, self.teacher = Softmax(), Softmax()  # of the others
        self.starts: list[int] = []
        self.sums: list[mx.array] = []

    def add(self, u: mx.array, v: mx.array, start: int) -> list[mx.array]:
        """Take a block's scaled logits; returns what must be computed before the next one."""
        self.starts.append(start)
        done = [*self.logit.add(u, start), *self.teacher_logit.add(v, start)]
        u, v = (add_at(logits, self.targets, start, FLOOR) for logits in (u, v))
        for softmax, logits in ((self.student, u), (self.teacher, v)):
            done += softmax.add(logits, logits.max(axis=1, keepdims=True))
        self.sums.append(row_dot(self.teacher.kept[-1], v - u))
        return [*done, self.sums[-1]]

    def close(self) -> mx.array:
        """The divergence [C, 1], once all blocks were added."""
        self.student.close()
        self.teacher.close()
        self.log_s, log_others = _two(self.logit, self.student)
        log_t, log_teacher_others = _two(self.teacher_logit, self.teacher)
        self.s, self.others, t = mx.exp(self.log_s), mx.exp(log_others), mx.exp(log_t)
        self.excess = self.s - t
        of_others = mx.exp(log_teacher_others) * (log_teacher_others - log_others)
        target = t * (log_t - self.log_s) + of_others
        rest = self.teacher.mean(self.sums) + self.student.log_ratio(self.teacher)
        return self.target * target + self.rest * rest

    def gradient(self, block: int, weight: mx.array, ce_weight: mx.array) -> mx.array:
        """weight [C, 1] times its gradient with respect to a block's logits, plus ce_weight [C, 1]
        times the student's probabilities.
        """
        excess = self.target * weight * self.excess
        among = (self.rest * weight - excess + ce_weight * self.others) * self.student.scales[block]
        teacher = -self.rest * weight * self.teacher.scales[block]
        found = blend(self.student.kept[block], among, self.teacher.kept[block], teacher)
        return add_at(found, self.targets, self.starts[block], excess + ce_weight * self.s)


def _two(logit: Picked, others: Softmax) -> tuple[mx.array, mx.array]:
    """Log-probabilities [C, 1] of the target and of all others together."""
    above = (logit.logits - others.top) - others.log_sum
    return -mx.logaddexp(0.0, -above), -mx.logaddexp(0.0, above)
