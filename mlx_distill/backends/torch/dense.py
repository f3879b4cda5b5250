"""The terms of the loss on torch where the teacher's logits are all there, or there is no teacher.

In: logits of C positions, a spare buffer as large, the targets and the objective. Out: (gradient with
respect to the student's logits [C, V] or None, kd, ce, agree [C, 1]). What comes in is overwritten,
and the gradient lies in one of the buffers. Axes: `C` positions, `V` vocabulary.
"""

import torch
from torch import Tensor

from mlx_distill.backends.torch.divergences import divergence
from mlx_distill.backends.torch.heads import FLOOR
from mlx_distill.backends.torch.vocabulary import add_at, log_softmax, most_likely
from mlx_distill.objective import Objective

Terms = tuple[Tensor | None, Tensor, Tensor, Tensor]


def against_nothing(
    z: Tensor, spare: Tensor, targets: Tensor, ce_weight: float, wants_gradient: bool
) -> Terms:
    """Cross-entropy alone; its gradient is `ce_weight` times the student's probabilities less one
    at the target.
    """
    nothing = z.new_zeros((len(z), 1))
    u = log_softmax(z, spare)
    ce = -u.gather(1, targets)
    if not wants_gradient:
        return None, nothing, ce, nothing
    gradient = u.exp_().mul_(ce_weight)
    add_at(gradient, targets, -ce_weight)
    return gradient, nothing, ce, nothing


def against_logits(
    z: Tensor, t: Tensor, spare: Tensor, targets: Tensor, objective: Objective, wants_gradient: bool
) -> Terms:
    """Against the teacher's logits t [C, V]: the divergence at the objective's temperature, the
    cross-entropy at 1.
    """
    t.clamp_(min=FLOOR)
    agree = (most_likely(z) == most_likely(t)).float()
    temperature, ce_weight = objective.temperature, 1 - objective.kd_weight
    shared = temperature == 1  # both terms are of the same softmax
    if not shared:
        plain = log_softmax(z, torch.empty_like(z))
        ce = -plain.gather(1, targets)
        z.div_(temperature), t.div_(temperature)
    u = log_softmax(z, spare)
    if shared:
        ce = -u.gather(1, targets)
    v = log_softmax(t, z)
    weight = objective.kd_weight * objective.divergence_scale / temperature
    kd, gradient = divergence(
        u, v, t, objective, weight, ce_weight if shared else 0.0, wants_gradient, targets
    )
    kd = kd * objective.divergence_scale
    if gradient is None:
        return None, kd, ce, agree
    if objective.needs_targets:
        if not shared:
            gradient.add_(plain.exp_().mul_(ce_weight))
        add_at(gradient, targets, -ce_weight)
    return gradient, kd, ce, agree
