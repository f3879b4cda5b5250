"""The terms of the loss on torch where only K of the teacher's ids are known, and the log of the rest.

In and out as in `dense.py`. Student and teacher are compared over K + 1 outcomes, the last being
"any other id". Axes: `C` positions, `V` vocabulary, `K` kept teacher tokens.
"""

import torch
from torch import Tensor

from mlx_distill.backends.torch.dense import Terms
from mlx_distill.backends.torch.divergences import divergence
from mlx_distill.backends.torch.heads import FLOOR, SparseHead
from mlx_distill.backends.torch.vocabulary import log_softmax, most_likely
from mlx_distill.objective import Objective


def against_some_ids(
    z: Tensor,
    teacher: SparseHead,
    spare: Tensor,
    targets: Tensor,
    objective: Objective,
    wants_gradient: bool,
) -> Terms:
    """The last outcome's logit is the log-sum-exp of all other ids, so its gradient is shared among
    them by their softmax.
    """
    known, ids = teacher.ids >= 0, teacher.ids.clamp(min=0).long()
    agree = (most_likely(z) == teacher.top[:, None]).float()
    target_logit = z.gather(1, targets)
    kept = torch.where(known, z.gather(1, ids), FLOOR)
    others = z.scatter_add_(1, ids, torch.where(known, FLOOR, 0.0))
    log_share = log_softmax(others, spare)
    rest = others.amax(1, keepdim=True) - log_share.amax(1, keepdim=True)
    outcomes = torch.cat([kept, rest], 1)
    ce = outcomes.logsumexp(1, keepdim=True) - target_logit
    u = outcomes.log_softmax(1)
    v = torch.cat([teacher.log_probs, teacher.tail[:, None]], 1).clamp_(min=FLOOR).log_softmax(1)
    kd_weight, ce_weight = objective.kd_weight, 1 - objective.kd_weight
    outcome = (teacher.ids == targets).int().argmax(1, keepdim=True)  # that dkd asks for
    kd, gradient = divergence(
        u, v, torch.empty_like(u), objective, kd_weight, ce_weight, wants_gradient, outcome
    )
    kd = kd + teacher.offset[:, None]
    if gradient is None:
        return None, kd, ce, agree
    everywhere = log_share.exp_().mul_(gradient[:, -1:])
    everywhere.scatter_add_(1, ids, torch.where(known, gradient[:, :-1], 0.0))
    everywhere.scatter_add_(1, targets, torch.full_like(ce, -ce_weight))
    return everywhere, kd, ce, agree
