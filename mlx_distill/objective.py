"""What the student is asked to minimise, defined once in float64 numpy.

In: logits of student and teacher at the N loss positions, the target tokens and an `Objective`.
Out: one number a row, or the gradient of a row's number with respect to the student's logits. These
are the definitions, written to be read and to be right; every backend computes the same numbers
without ever holding [N, V] and is tested against this file. Logits of -inf (padding, forbidden
tokens) have probability 0 and add nothing; a divergence is infinite only where it really is:
forward KL where the student forbids what the teacher gives, reverse KL where the teacher forbids
what the student gives. What each divergence is stands in `divergences.py`. Axes: `N` loss
positions, `V` vocabulary.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Literal, TypeVar

import numpy as np
from scipy import special

from mlx_distill.divergences import DIVERGENCES, dkd, log_softmax
from mlx_distill.recipe.training_tables import ObjectiveTable

# the cross-entropy of what follows a cut, which learns from the text alone
ENDING = "ending"
Values = TypeVar("Values", float, np.ndarray)


@dataclass(frozen=True)
class Objective:
    """`kd_weight * divergence + (1 - kd_weight) * cross_entropy`, per position.

    The divergence is one of `DIVERGENCES`, or "dkd". kd_weight 0 needs no teacher; kd_weight 1
    leaves the targets without a gradient, but for dkd. `temperature` divides both logits inside the
    divergence and never those of the cross-entropy; "hinton" multiplies the divergence, value and
    gradient, by temperature squared.
    """

    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    kd_weight: float = 0.5
    temperature: float = 1.0
    temperature_scaling: Literal["none", "hinton"] = "hinton"
    skew_alpha: float = 0.1
    mixed_weight: float = 0.5
    entropy_half: float = 1.0
    dkd_target: float = 1.0
    dkd_rest: float = 1.0
    hidden_weight: float = 0.0
    hidden_distance: Literal["mse", "cosine"] = "mse"

    @classmethod
    def from_table(cls, table: ObjectiveTable) -> "Objective":
        """The objective that a recipe's `[objective]` table asks for: its fields of the same names,
        and of total variation the scale.
        """
        asked = cls(**{field.name: getattr(table, field.name) for field in fields(cls)})
        logarithmic = table.divergence == "tvd" and table.tvd_scale == "log"
        return replace(asked, divergence="log_tvd") if logarithmic else asked

    @property
    def matches_hidden(self) -> bool:
        """Whether hidden states are compared, too."""
        return self.hidden_weight > 0

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    @property
    def needs_targets(self) -> bool:
        return self.kd_weight < 1

    @property
    def weights(self) -> dict[str, float]:
        """What each term of the loss counts, by its name: kd (the divergence), ce, and hidden (the
        distance of hidden states).
        """
        found = {"kd": self.kd_weight} if self.needs_teacher else {}
        found["ce"] = 1 - self.kd_weight
        return found | ({"hidden": self.hidden_weight} if self.matches_hidden else {})

    def weights_of(self, terms: Collection[str]) -> dict[str, float]:
        """The same of a run whose terms are these: `ENDING` may be one, and counts whole."""
        return self.weights | ({ENDING: 1.0} if ENDING in terms else {})

    @property
    def text_alone(self) -> "Objective":
        """What is minimised where no teacher is asked: the cross-entropy, and all of it."""
        return replace(self, kd_weight=0.0, hidden_weight=0.0)

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
            "entropy_kl": self.entropy_half,
        }.get(self.divergence, 0.0)

    @property
    def divergence_scale(self) -> float:
        """What multiplies the divergence: temperature squared under "hinton" (Hinton et al. 2015,
        §2.1), else 1.
        """
        return self.temperature**2 if self.temperature_scaling == "hinton" else 1.0


def _value_and_gradient(
    u: np.ndarray, v: np.ndarray, objective: Objective, targets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The divergence [N] of log-probabilities u and v [N, V], and its gradient with respect to the
    logits of which u are: g - s Σ g where it is a pair.
    """
    if objective.divergence == "dkd":
        assert targets is not None, "dkd asks which id the text has"
        return dkd(u, v, targets, objective.dkd_target, objective.dkd_rest)
    with np.errstate(invalid="ignore"):  # where both probabilities are 0, or it is infinite
        f, g = DIVERGENCES[objective.divergence](u, v, objective.parameter)
        return f.sum(axis=-1), g - np.exp(u) * g.sum(axis=-1, keepdims=True)


def divergence(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray,
    objective: Objective,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """The objective's divergence of logits [N, V], temperature and its scaling included, as
    float64[N] in nats. Targets [N] are of dkd alone, here and below.
    """
    u, v = _at_temperature(student_logits, teacher_logits, objective)
    return objective.divergence_scale * _value_and_gradient(u, v, objective, targets)[0]


def coarse_divergence(
    student_logits: np.ndarray,
    ids: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray,
    objective: Objective,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """The divergence at temperature 1 where only K of the teacher's log-probabilities are known, as
    float64[N] in nats.

    ids int[N, K] (-1 pads), log_probs [N, K], tail [N]: log of the teacher's mass on all other ids.
    Student and teacher are compared as distributions over K + 1 outcomes, the last being "any other
    id". Grouping outcomes never raises a divergence of probabilities, so this is a lower bound of
    the full one, and equal to it where all ids are given (but for dkd and entropy_kl, whose weights
    grouping changes). The student is not renormalised to the K ids: its mass elsewhere is in its
    last outcome. Of dkd the target must be one of the ids.
    """
    u, v = _coarse(student_logits, ids, log_probs, tail)
    return _value_and_gradient(u, v, objective, _outcome_of(targets, ids))[0]


def coarse_divergence_grad(
    student_logits: np.ndarray,
    ids: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray,
    objective: Objective,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """d coarse_divergence[n] / d student_logits[n, v], as float64[N, V].

    The last outcome's logit is the log-sum-exp of all other logits, so its gradient is shared among
    them by their softmax.
    """
    u, v = _coarse(student_logits, ids, log_probs, tail)
    _, outcomes = _value_and_gradient(u, v, objective, _outcome_of(targets, ids))
    others = _others(student_logits, ids)
    possible = np.isfinite(others).any(axis=-1, keepdims=True)
    share = special.softmax(np.where(possible, others, 0.0), axis=-1) * possible
    result = outcomes[:, -1:] * share
    rows, columns = np.nonzero(ids >= 0)
    result[rows, ids[rows, columns]] = outcomes[rows, columns]
    return result


def hidden_distance(student: np.ndarray, teacher: np.ndarray, kind: str) -> np.ndarray:
    """How far hidden states [N, D] of a student, projected to the teacher's width, are from the
    teacher's, as float64[N]: the mean squared difference, or 1 - their cosine.

    FitNets (Romero et al. 2015, arXiv 1412.6550) learn hints through a trained projection, as here;
    TinyBERT (Jiao et al. 2020, arXiv 1909.10351) takes each layer's mean square, DistilBERT (Sanh et
    al. 2019, arXiv 1910.01108) the cosine.
    """
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if kind == "mse":
        return ((student - teacher) ** 2).mean(axis=-1)
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(axis=-1) / lengths


def layer_beside(layer: int, layers: int, of_teacher: int) -> int:
    """Which of a teacher's layers, counted from 1, stands at the same share of the depth as a
    student's; the last beside the last.
    """
    return max(1, (2 * layer * of_teacher + layers) // (2 * layers))


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
        terms["kd"] = divergence(student_logits, teacher_logits, objective, targets)
    if objective.needs_targets:
        terms["ce"] = cross_entropy(student_logits, targets)
    return objective.total(terms)


def divergence_grad(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray,
    objective: Objective,
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """d divergence[n] / d student_logits[n, v], as float64[N, V]."""
    u, v = _at_temperature(student_logits, teacher_logits, objective)
    scale = objective.divergence_scale / objective.temperature
    return scale * _value_and_gradient(u, v, objective, targets)[1]


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
        of_divergence = divergence_grad(student_logits, teacher_logits, objective, targets)
        gradient += objective.kd_weight * of_divergence
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


def _outcome_of(targets: np.ndarray | None, ids: np.ndarray) -> np.ndarray | None:
    """Which of the outcomes is the target, [N]; the ids are the first of them."""
    if targets is None:
        return None
    found = ids == np.asarray(targets)[:, None]
    assert found.any(axis=-1).all(), "a target is none of the ids"
    return found.argmax(axis=-1)


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
