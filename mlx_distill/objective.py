"""What the student is asked to minimise, defined once in float64 numpy.

In: logits of student and teacher at the N loss positions, the target tokens and an `Objective`.
Out: one number a row, or the gradient of a row's number with respect to the student's logits. These
are the definitions, written to be read and to be right; every backend computes the same numbers
without ever holding [N, V] and is tested against this file. Logits of -inf (padding, forbidden
tokens) have probability 0 and add nothing; a divergence is infinite only where it really is:
forward KL where the student forbids what the teacher gives, reverse KL where the teacher forbids
what the student gives. Axes: `N` loss positions, `V` vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Literal, TypeVar

import numpy as np
from scipy import special

from mlx_distill.recipe.tables import ObjectiveTable
from mlx_distill.recipe.values import Divergence

# the cross-entropy of what follows a cut, which learns from the text alone
ENDING = "ending"
Values = TypeVar("Values", float, np.ndarray)


@dataclass(frozen=True)
class Objective:
    """`kd_weight * divergence + (1 - kd_weight) * cross_entropy`, per position.

    kd_weight 0 needs no teacher; kd_weight 1 leaves the targets without a gradient. `temperature`
    divides both logits inside the divergence and never those of the cross-entropy; "hinton"
    multiplies the divergence, value and gradient, by temperature squared.
    """

    divergence: Divergence = "forward_kl"
    jsd_beta: float = 0.5
    kd_weight: float = 0.5
    temperature: float = 1.0
    temperature_scaling: Literal["none", "hinton"] = "hinton"
    skew_alpha: float = 0.1
    mixed_weight: float = 0.5

    @classmethod
    def from_table(cls, table: ObjectiveTable) -> "Objective":
        """The objective that a recipe's `[objective]` table asks for: its fields of the same names."""
        return cls(**{field.name: getattr(table, field.name) for field in fields(cls)})

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    @property
    def needs_targets(self) -> bool:
        return self.kd_weight < 1

    @property
    def weights(self) -> dict[str, float]:
        """What each term of the loss counts, by its name: kd (the divergence) and ce."""
        ce = {"ce": 1 - self.kd_weight}
        return {"kd": self.kd_weight, **ce} if self.needs_teacher else ce

    def weights_of(self, terms: Collection[str]) -> dict[str, float]:
        """The same of a run whose terms are these: `ENDING` may be one, and counts whole."""
        return self.weights | ({ENDING: 1.0} if ENDING in terms else {})

    @property
    def text_alone(self) -> "Objective":
        """What is minimised where no teacher is asked: the cross-entropy, and all of it."""
        return replace(self, kd_weight=0.0)

    def total(self, terms: Mapping[str, Values]) -> Values:
        """The loss: the weighted sum of its terms. One that counts nothing may be missing."""
        shares = self.weights_of(terms).items()
        return reduce(add, (share * terms[name] for name, share in shares if share))

    @property
    def parameter(self) -> float:
        """The divergence's own number; 0 for one that has none."""
        return {
            "jsd": self.jsd_beta,
            "skew_kl": self.skew_alpha,
            "skew_reverse_kl": self.skew_alpha,
            "mixed_kl": self.mixed_weight,
        }.get(self.divergence, 0.0)

    @property
    def divergence_scale(self) -> float:
        """What multiplies the divergence: temperature squared under "hinton" (Hinton et al. 2015,
        §2.1), else 1.
        """
        return self.temperature**2 if self.temperature_scaling == "hinton" else 1.0


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


def mixed_kl(u: np.ndarray, v: np.ndarray, weight: float) -> Pair:
    """w KL(t‖s) + (1-w) KL(s‖t): forward and reverse KL at once.

    As the code of *Distilling the Essence* mixes them, with KL where that has the cross-entropy.
    """
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
    "mixed_kl": mixed_kl,
}


def _times(log_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p x, and 0 where p is 0, whatever x is."""
    return np.where(np.isfinite(log_p), np.exp(log_p) * x, 0.0)


def _log_mixture(log_p: np.ndarray, log_q: np.ndarray, share: float) -> np.ndarray:
    """Log of share p + (1 - share) q."""
    return np.logaddexp(np.log(share) + log_p, np.log1p(-share) + log_q)


def _value(u: np.ndarray, v: np.ndarray, objective: Objective) -> np.ndarray:
    """Σ f, as [N]."""
    with np.errstate(invalid="ignore"):  # where both probabilities are 0
        f, _ = DIVERGENCES[objective.divergence](u, v, objective.parameter)
    return f.sum(axis=-1)


def _gradient(u: np.ndarray, v: np.ndarray, objective: Objective) -> np.ndarray:
    """g - s Σ g: the gradient with respect to the logits of which u are the log-probabilities, as
    [N, V].
    """
    with np.errstate(invalid="ignore"):
        _, g = DIVERGENCES[objective.divergence](u, v, objective.parameter)
    return g - np.exp(u) * g.sum(axis=-1, keepdims=True)


def divergence(
    student_logits: np.ndarray, teacher_logits: np.ndarray, objective: Objective
) -> np.ndarray:
    """The objective's divergence of logits [N, V], temperature and its scaling included, as
    float64[N] in nats.
    """
    return objective.divergence_scale * _value(
        *_at_temperature(student_logits, teacher_logits, objective), objective
    )


def coarse_divergence(
    student_logits: np.ndarray,
    ids: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray,
    objective: Objective,
) -> np.ndarray:
    """The divergence at temperature 1 where only K of the teacher's log-probabilities are known, as
    float64[N] in nats.

    ids int[N, K] (-1 pads), log_probs [N, K], tail [N]: log of the teacher's mass on all other ids.
    Student and teacher are compared as distributions over K + 1 outcomes, the last being "any other
    id". Grouping outcomes never raises a divergence, so this is a lower bound of the full one, and
    equal to it where all ids are given. The student is not renormalised to the K ids: its mass
    elsewhere is in its last outcome.
    """
    return _value(*_coarse(student_logits, ids, log_probs, tail), objective)


def coarse_divergence_grad(
    student_logits: np.ndarray,
    ids: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray,
    objective: Objective,
) -> np.ndarray:
    """d coarse_divergence[n] / d student_logits[n, v], as float64[N, V].

    The last outcome's logit is the log-sum-exp of all other logits, so its gradient is shared among
    them by their softmax.
    """
    outcomes = _gradient(*_coarse(student_logits, ids, log_probs, tail), objective)
    others = _others(student_logits, ids)
    possible = np.isfinite(others).any(axis=-1, keepdims=True)
    share = special.softmax(np.where(possible, others, 0.0), axis=-1) * possible
    result = outcomes[:, -1:] * share
    rows, columns = np.nonzero(ids >= 0)
    result[rows, ids[rows, columns]] = outcomes[rows, columns]
    return result


def cross_entropy(student_logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(student_logits)[target] at temperature 1, as float64[N] in nats."""
    return -log_softmax(student_logits)[np.arange(len(targets)), targets]


def same_choice(student_logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """Whether the student's first most likely id is the teacher's first most likely id, as bool[N].

    Of ids that are equally likely the lowest is the first. At any temperature: dividing logits
    changes no order.
    """
    return student_logits.argmax(axis=-1) == teacher_logits.argmax(axis=-1)


def loss(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray | None,
    targets: np.ndarray,
    objective: Objective,
) -> np.ndarray:
    """`kd_weight * divergence + (1 - kd_weight) * cross_entropy` of logits [N, V] and targets [N],
    as float64[N].
    """
    terms = {}
    if objective.needs_teacher:
        assert teacher_logits is not None, "the objective needs a teacher"
        terms["kd"] = divergence(student_logits, teacher_logits, objective)
    if objective.needs_targets:
        terms["ce"] = cross_entropy(student_logits, targets)
    return objective.total(terms)


def divergence_grad(
    student_logits: np.ndarray, teacher_logits: np.ndarray, objective: Objective
) -> np.ndarray:
    """d divergence[n] / d student_logits[n, v], as float64[N, V]."""
    scale = objective.divergence_scale / objective.temperature
    return scale * _gradient(*_at_temperature(student_logits, teacher_logits, objective), objective)


def cross_entropy_grad(student_logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """d cross_entropy[n] / d student_logits[n, v] = softmax - one-hot, as float64[N, V]."""
    gradient = special.softmax(np.asarray(student_logits, np.float64), axis=-1)
    gradient[np.arange(len(targets)), targets] -= 1
    return gradient


def grad(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray | None,
    targets: np.ndarray,
    objective: Objective,
) -> np.ndarray:
    """d loss[n] / d student_logits[n, v], as float64[N, V]."""
    gradient = np.zeros(student_logits.shape)
    if objective.needs_teacher:
        assert teacher_logits is not None, "the objective needs a teacher"
        gradient += objective.kd_weight * divergence_grad(student_logits, teacher_logits, objective)
    if objective.needs_targets:
        gradient += (1 - objective.kd_weight) * cross_entropy_grad(student_logits, targets)
    return gradient


def _coarse(
    student_logits: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log-probabilities [N, K+1] of student and teacher over the ids and "any other id"."""
    others = _others(student_logits, ids)
    rest = special.logsumexp(others, axis=-1, keepdims=True)  # -inf where no other id is left
    kept = np.where(
        ids < 0,
        -np.inf,
        np.take_along_axis(np.asarray(student_logits, np.float64), np.maximum(ids, 0), -1),
    )
    teacher = np.concatenate(
        [np.asarray(log_probs, np.float64), np.asarray(tail, np.float64)[:, None]], -1
    )
    return log_softmax(np.concatenate([kept, rest], -1)), log_softmax(teacher)


def _others(student_logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The logits [N, V] with -inf at the ids."""
    others = np.array(student_logits, np.float64)
    rows, columns = np.nonzero(ids >= 0)
    others[rows, ids[rows, columns]] = -np.inf
    return others


def _at_temperature(
    student_logits: np.ndarray, teacher_logits: np.ndarray, objective: Objective
) -> tuple[np.ndarray, np.ndarray]:
    student, teacher = (
        np.asarray(student_logits, np.float64),
        np.asarray(teacher_logits, np.float64),
    )
    return log_softmax(student / objective.temperature), log_softmax(
        teacher / objective.temperature
    )
