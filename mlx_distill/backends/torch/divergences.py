"""The divergences on torch, over the whole vocabulary of some positions.

In: log-probabilities u of the student and v of the teacher. Out: the divergence, and its gradient
with respect to the student's logits. A divergence is a pair of f and g = ∂f/∂u for every id, as
`objective.py` defines them: Σ f is its value and g - s Σ g its gradient, with s = exp(u). Axes: `C`
positions, `V` vocabulary.
"""

import torch
from torch import Tensor

from mlx_distill.objective import Objective

TINY = 1.1754944e-38  # smallest normal float32

Pair = tuple[Tensor, Tensor]


def divergence(
    u: Tensor,
    v: Tensor,
    spare: Tensor,
    objective: Objective,
    weight: float,
    ce_weight: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Σ f [C, 1], and weight (g - s Σ g) + ce_weight s [C, V], of log-probabilities u and v [C, V].

    u, v and the spare buffer are overwritten; the gradient may lie in one of them.
    """
    s = torch.exp(u, out=spare)
    f, g = PAIRS[objective.divergence](u, v, s, objective.parameter)
    value = f.sum(1, keepdim=True)
    if not wants_gradient:
        return value, None
    known = SUM_OF_G.get(objective.divergence)
    total = g.sum(1, keepdim=True) if known is None else torch.full_like(value, known)
    return value, g.mul_(weight).addcmul_(s, ce_weight - weight * total)


# `objective.py`'s pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v, which they
# may overwrite, and the student's probabilities s, which stay. On a CPU a fresh buffer costs more
# than what is written into it. What is a multiple of s may be left out of g: g - s Σ g is the same
# without it.


def forward_kl(u: Tensor, v: Tensor, s: Tensor, parameter: float) -> Pair:
    log_ratio = torch.sub(v, u, out=u)
    t = v.exp_()
    return log_ratio.mul_(t), t.neg_()


def reverse_kl(u: Tensor, v: Tensor, s: Tensor, parameter: float) -> Pair:
    f = u.sub_(v).mul_(s)
    return f, f


def jsd(u: Tensor, v: Tensor, s: Tensor, beta: float) -> Pair:
    t = v.exp_()
    m = torch.lerp(s, t, beta, out=u).clamp_(min=TINY)
    student = s.clamp(min=TINY).div_(m).log_().mul_(s).mul_(1 - beta)
    return t.clamp(min=TINY).div_(m).log_().mul_(t).mul_(beta).add_(student), student


def skew_kl(u: Tensor, v: Tensor, s: Tensor, alpha: float) -> Pair:
    t = v.exp_()
    m = torch.lerp(s, t, alpha, out=u).clamp_(min=TINY)
    ratio = t.clamp(min=TINY).div_(m)
    return torch.log(ratio, out=m).mul_(t), ratio.mul_(s).mul_(alpha - 1)


def skew_reverse_kl(u: Tensor, v: Tensor, s: Tensor, alpha: float) -> Pair:
    t = v.exp_()
    m = torch.lerp(t, s, alpha, out=u).clamp_(min=TINY)
    ratio = s.clamp(min=TINY).div_(m)
    f = torch.log(ratio, out=m).mul_(s)
    return f, torch.sub(f, ratio.mul_(s), alpha=alpha)


def tvd(u: Tensor, v: Tensor, s: Tensor, parameter: float) -> Pair:
    difference = torch.sub(s, v.exp_(), out=u)
    g = torch.sign(difference, out=v).mul_(s).mul_(0.5)
    return difference.abs_().mul_(0.5), g


def mixed_kl(u: Tensor, v: Tensor, s: Tensor, weight: float) -> Pair:
    log_ratio = u.sub_(v)
    t = v.exp_()
    reverse = (s * log_ratio).mul_(1 - weight)
    f = torch.sub(reverse, log_ratio.mul_(t), alpha=weight, out=log_ratio)
    return f, reverse.sub_(t, alpha=weight)


PAIRS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "mixed_kl": mixed_kl,
}

# Σ g where it is known without a sum, as -Σ t is: on CUDA the compiled kernel then writes no [C, V]
# but the gradient.
SUM_OF_G = {"forward_kl": -1.0}
