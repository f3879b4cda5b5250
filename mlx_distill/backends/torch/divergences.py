"""The divergences on torch, over the whole vocabulary of some positions.

In: log-probabilities u of the student and v of the teacher, and the targets. Out: the divergence,
and its gradient with respect to the student's logits. A divergence is a pair of f and g = ∂f/∂u for
every id, as `mlx_distill/divergences.py` defines them: Σ f is its value and g - s Σ g its gradient,
with s = exp(u). `dkd` alone asks for the targets and is no pair. Axes: `C` positions, `V`
vocabulary.
"""

import torch
from torch import Tensor

from mlx_distill.backends.torch.heads import FLOOR
from mlx_distill.backends.torch.vocabulary import add_at, log_softmax, set_at
from mlx_distill.objective import Objective

TINY = 1.1754944e-38  # smallest normal float32
FORBIDDEN = -1e6  # log-probabilities below it come of logits of -inf

Pair = tuple[Tensor, Tensor]


def divergence(
    u: Tensor,
    v: Tensor,
    spare: Tensor,
    objective: Objective,
    weight: float,
    ce_weight: float,
    wants_gradient: bool,
    targets: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Σ f [C, 1], and weight (g - s Σ g) + ce_weight s [C, V], of log-probabilities u and v [C, V]
    and targets [C, 1].

    u, v and the spare buffer are overwritten; the gradient may lie in one of them.
    """
    if objective.divergence == "dkd":
        return _decoupled(u, v, spare, objective, weight, ce_weight, wants_gradient, targets)
    return _of_pair(
        objective.divergence, u, v, spare, objective.parameter, weight, ce_weight, wants_gradient
    )


def _of_pair(
    name: str,
    u: Tensor,
    v: Tensor,
    spare: Tensor,
    parameter: float,
    weight: float,
    ce_weight: float | Tensor,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `divergence` returns, of a pair by its name; ce_weight may be one a row, [C, 1]."""
    s = torch.exp(u, out=spare)
    f, g = PAIRS[name](u, v, s, parameter)
    value = f.sum(1, keepdim=True)
    if not wants_gradient:
        return value, None
    known = SUM_OF_G.get(name)
    total = g.sum(1, keepdim=True) if known is None else torch.full_like(value, known)
    return value, g.mul_(weight).addcmul_(s, ce_weight - weight * total)


def _decoupled(
    u: Tensor,
    v: Tensor,
    spare: Tensor,
    objective: Objective,
    weight: float,
    ce_weight: float,
    wants_gradient: bool,
    targets: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What `divergence` returns, of `dkd`: forward KL of all ids but the target, renormalised, and
    that of the target against all of them.
    """
    log_s, log_t = u.gather(1, targets), v.gather(1, targets)
    others, rest = _others(u, targets, spare)
    teacher_others, teacher_rest = _others(v, targets, u)
    s, t = log_s.exp(), log_t.exp()
    value = t * (log_t - log_s) + teacher_rest.exp() * (teacher_rest - rest)
    excess = objective.dkd_target * weight * (s - t)
    among, gradient = _of_pair(
        "forward_kl",
        others,
        teacher_others,
        v,
        0.0,
        objective.dkd_rest * weight,
        ce_weight * rest.exp() - excess,
        wants_gradient,
    )
    if gradient is not None:
        add_at(gradient, targets, excess + ce_weight * s)
    return objective.dkd_target * value + objective.dkd_rest * among, gradient


def _others(log_p: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the others alone [C, V], in `out`, and of all of them together [C, 1]."""
    set_at(log_p, targets, FLOOR)
    alone = log_softmax(log_p, out)
    return alone, log_p.amax(1, keepdim=True) - alone.amax(1, keepdim=True)


# The definitions' pairs of f and g = ∂f/∂u for every id, of log-probabilities u and v, which they
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


def log_tvd(u: Tensor, v: Tensor, s: Tensor, parameter: float) -> Pair:
    forbidden = (u < FORBIDDEN).logical_or_(v < FORBIDDEN)
    difference = u.sub_(v).masked_fill_(forbidden, 0.0)
    g = torch.sign(difference, out=v).mul_(0.5)
    return difference.abs_().mul_(0.5), g


def mixed_kl(u: Tensor, v: Tensor, s: Tensor, weight: float) -> Pair:
    return _mixed(u, v, s, weight, torch.empty_like(s))


def entropy_kl(u: Tensor, v: Tensor, s: Tensor, half: float) -> Pair:
    t = v.exp()
    entropy = -torch.linalg.vecdot(t, v)[:, None]
    return _mixed(u, v, s, entropy / (entropy + half), t)


def _mixed(u: Tensor, v: Tensor, s: Tensor, weight: float | Tensor, spare: Tensor) -> Pair:
    """Forward KL by its weight, one number or one a row, and reverse KL by the rest."""
    log_ratio = u.sub_(v)
    t = v.exp_().mul_(weight)
    reverse = torch.mul(s, log_ratio, out=spare).mul_(1 - weight)
    f = torch.sub(reverse, log_ratio.mul_(t), out=log_ratio)
    return f, reverse.sub_(t)


PAIRS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "log_tvd": log_tvd,
    "mixed_kl": mixed_kl,
    "entropy_kl": entropy_kl,
}

# Σ g where it is known without a sum, as -Σ t is: on CUDA the compiled kernel then writes no [C, V]
# but the gradient.
SUM_OF_G = {"forward_kl": -1.0}
