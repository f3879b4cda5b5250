"""The divergences of a student from its teacher, defined once in float64 numpy, id by id.

In: log-probabilities u of the student and v of the teacher, [N, V]. Out: for every id what it adds
to the divergence and the derivative of that; or, for a divergence that asks which id the text has,
its value and gradient as a whole. These are the definitions, with their sources; `objective.py` says
at which temperature they are taken and what is made of them. Axes: `N` loss positions, `V`
vocabulary.
"""

from collections.abc import Callable

import numpy as np
from scipy import special


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities along the last axis; a logit of -inf stays -inf."""
    return special.log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p‖q) in nats of log-probabilities [N, V], as [N]; 0 log 0 is 0."""
    with np.errstate(invalid="ignore"):
        return _times(log_p, log_p - log_q).sum(axis=-1)


# A divergence is Σ f(u, v) over the vocabulary, of log-probabilities u of the student and v of the
# teacher. Each function below gives f and g = ∂f/∂u for every id by itself. The gradient with
# respect to the student's logits is then g - s Σ g with s = exp(u), the student's probabilities; t
# = exp(v) are the teacher's. They are written in logarithms: scipy's `rel_entr`, of probabilities,
# is infinite where the second one is less than a float64 can hold.

Pair = tuple[np.ndarray, np.ndarray]


def forward_kl(u: np.ndarray, v: np.ndarray, parameter: float) -> Pair:
    """KL(t‖s): the student must cover what the teacher does."""
    return _times(v, v - u), -np.exp(v)


def reverse_kl(u: np.ndarray, v: np.ndarray, parameter: float) -> Pair:
    """KL(s‖t): the student must avoid what the teacher does not do."""
    return _times(u, u - v), _times(u, u - v + 1)


def jsd(u: np.ndarray, v: np.ndarray, beta: float) -> Pair:
    """Generalised Jensen-Shannon divergence: β KL(t‖m) + (1-β) KL(s‖m) with m = β t + (1-β) s.

    The convention of GKD (arXiv 2306.13649, §2, with P the teacher): symmetric at β = ½, where it
    is at most log 2; divided by β it tends to forward KL as β → 0, divided by 1-β to reverse KL as
    β → 1.
    """
    log_mixture = _log_mixture(v, u, beta)
    student = (1 - beta) * _times(u, u - log_mixture)
    # the terms in which m itself moves sum to m/m and cancel
    return beta * _times(v, v - log_mixture) + student, student


def skew_kl(u: np.ndarray, v: np.ndarray, alpha: float) -> Pair:
    """KL(t‖m) with m = (1-α) s + α t: forward KL that is at most log 1/α, for the teacher lends the
    student a share α.

    DistiLLM (arXiv 2402.03898, §3.1), whose α = 0.1 is the default.
    """
    log_ratio = v - _log_mixture(v, u, alpha)
    return _times(v, log_ratio), -(1 - alpha) * _times(u, np.exp(log_ratio))


def skew_reverse_kl(u: np.ndarray, v: np.ndarray, alpha: float) -> Pair:
    """KL(s‖m) with m = (1-α) t + α s: reverse KL that is at most log 1/α, for the student lends the
    teacher a share α.

    DistiLLM (arXiv 2402.03898, §3.1).
    """
    log_ratio = u - _log_mixture(u, v, alpha)
    return _times(u, log_ratio), _times(u, log_ratio + 1 - alpha * np.exp(log_ratio))


def tvd(u: np.ndarray, v: np.ndarray, parameter: float) -> Pair:
    """Total variation distance ½ Σ |s - t|: at most 1, and no id weighs more than its probability.

    Wen et al. 2023 (f-distill, arXiv 2307.15190). Where s = t the gradient of that id is taken as 0.
    """
    difference = np.exp(u) - np.exp(v)
    return np.abs(difference) / 2, _times(u, np.sign(difference) / 2)


def log_tvd(u: np.ndarray, v: np.ndarray, parameter: float) -> Pair:
    """½ Σ |log s - log t|: all ids count the same, however unlikely, but for those that one of the
    two forbids, which add nothing.

    The log scale of total variation in the code of *Distilling the Essence*.
    """
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isfinite(u) & np.isfinite(v), u - v, 0.0)
    return np.abs(difference) / 2, np.sign(difference) / 2


def mixed_kl(u: np.ndarray, v: np.ndarray, weight: float) -> Pair:
    """w KL(t‖s) + (1-w) KL(s‖t): forward and reverse KL at once.

    As the code of *Distilling the Essence* mixes them, with KL where that has the cross-entropy.
    """
    return _mixed(u, v, np.array(weight))


def entropy_kl(u: np.ndarray, v: np.ndarray, half: float) -> Pair:
    """w KL(t‖s) + (1-w) KL(s‖t) with w = H / (H + half) of the teacher's entropy H in nats: reverse
    KL where the teacher is sure, forward KL where many ids may follow, half of each at H = half.

    After Entropy-Aware On-Policy Distillation (arXiv 2603.07079), which adds forward KL where H
    exceeds a threshold; without a threshold no rounding decides.
    """
    entropy = -_times(v, v).sum(axis=-1, keepdims=True)
    return _mixed(u, v, entropy / (entropy + half))


def _mixed(u: np.ndarray, v: np.ndarray, weight: np.ndarray) -> Pair:
    """Forward KL by its weight, one number or one a row [N, 1], and reverse KL by the rest."""
    (forward, of_forward), (reverse, of_reverse) = forward_kl(u, v, 0), reverse_kl(u, v, 0)
    value = weight * forward + (1 - weight) * reverse
    return value, weight * of_forward + (1 - weight) * of_reverse


DIVERGENCES: dict[str, Callable[[np.ndarray, np.ndarray, float], Pair]] = {
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


def dkd(
    u: np.ndarray, v: np.ndarray, targets: np.ndarray, target: float, rest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Decoupled distillation: its value [N], and its gradient with respect to the logits [N, V].

    target · KL(b_t‖b_s) + rest · KL(t̂‖ŝ): b is the probability of the target id and of all others
    together, t̂ and ŝ are the others alone, renormalised. Zhao et al. 2022 (arXiv 2203.08679, eq.
    7), whose α and β the two weights are. Forward KL is the same with rest = 1 - t(target): there
    the others count least where the teacher is sure of the text. Both models must give the others
    some probability.
    """
    rows = np.arange(len(targets))
    of_student, student_others = _apart(u, targets)
    of_teacher, teacher_others = _apart(v, targets)
    value = target * kl(of_teacher, of_student) + rest * kl(teacher_others, student_others)
    excess = target * (np.exp(of_student) - np.exp(of_teacher))  # of the two in b
    gradient = np.exp(student_others) * (excess[:, 1:] + rest) - rest * np.exp(teacher_others)
    gradient[rows, targets] = excess[:, 0]
    return value, gradient


def _apart(log_p: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the target and of any other id [N, 2], and of the others alone [N, V],
    -inf at the target.
    """
    rows = np.arange(len(targets))
    others = log_p.copy()
    others[rows, targets] = -np.inf
    rest = special.logsumexp(others, axis=-1)
    return np.stack([log_p[rows, targets], rest], axis=-1), others - rest[:, None]


def _times(log_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p x, and 0 where p is 0, whatever x is."""
    return np.where(np.isfinite(log_p), np.exp(log_p) * x, 0.0)


def _log_mixture(log_p: np.ndarray, log_q: np.ndarray, share: float) -> np.ndarray:
    """Log of share p + (1 - share) q."""
    return np.logaddexp(np.log(share) + log_p, np.log1p(-share) + log_q)
