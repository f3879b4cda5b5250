"""The definitions: hand numbers, signs, directions, temperature, and gradients against finite
differences.
"""

from dataclasses import asdict
from math import log
from typing import get_args

import numpy as np
import pytest

from mlx_distill import objective as definition
from mlx_distill.divergences import DIVERGENCES
from mlx_distill.objective import Objective
from mlx_distill.recipe.training_tables import ObjectiveTable
from mlx_distill.recipe.values import Divergence

ALL = (*DIVERGENCES, "dkd")  # the pairs, and the one that asks for the target
ONE_HALF = np.log([[0.5, 0.5]])
ONE_QUARTER = np.log([[0.25, 0.75]])


def random_logits(
    seed: int, rows: int = 6, vocab: int = 9, scale: float = 2.0
) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, rows, vocab)) * scale
    return student, teacher, rng.integers(0, vocab, rows)


def finite_differences(function, logits: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """d function(logits)[n] / d logits[n, v], central."""
    slope = np.zeros_like(logits)
    for v in range(logits.shape[1]):
        nudge = np.zeros_like(logits)
        nudge[:, v] = step
        slope[:, v] = (function(logits + nudge) - function(logits - nudge)) / (2 * step)
    return slope


def test_hand_numbers_and_directions():
    student, teacher = ONE_QUARTER, ONE_HALF
    forward = definition.divergence(student, teacher, Objective("forward_kl"))
    reverse = definition.divergence(student, teacher, Objective("reverse_kl"))
    assert forward == pytest.approx(0.5 * log(2) + 0.5 * log(2 / 3))  # KL(teacher‖student) = 0.1438
    assert reverse == pytest.approx(
        0.25 * log(1 / 2) + 0.75 * log(3 / 2)
    )  # KL(student‖teacher) = 0.1308
    mixture = np.array(
        [0.25 * 0.5 + 0.75 * 0.25, 0.25 * 0.5 + 0.75 * 0.75]
    )  # β = ¼ weighs the teacher
    by_hand = (
        0.25 * (0.5 * np.log(0.5 / mixture)).sum()
        + 0.75 * ([0.25, 0.75] * np.log([0.25, 0.75] / mixture)).sum()
    )
    assert definition.divergence(
        student, teacher, Objective("jsd", jsd_beta=0.25)
    ) == pytest.approx(by_hand)


def test_forward_kl_is_infinite_where_the_student_forbids_and_reverse_where_the_teacher_does():
    narrow, wide = np.array([[0.0, 0.0, -np.inf]]), np.array([[0.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        assert definition.divergence(narrow, wide, Objective("forward_kl")) == np.inf
        assert definition.divergence(wide, narrow, Objective("reverse_kl")) == np.inf
    assert definition.divergence(wide, narrow, Objective("forward_kl")) == pytest.approx(log(3 / 2))
    assert definition.divergence(narrow, wide, Objective("reverse_kl")) == pytest.approx(log(3 / 2))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_probability_below_a_float64_makes_nothing_infinite(divergence: str):
    """exp(-745) is the smallest float64, and half of it 0: scipy's `rel_entr` was infinite here."""
    likelier, rarer = np.array([[0.0, -745.0]]), np.array([[0.0, -2000.0]])
    for pair in ((likelier, rarer), (rarer, likelier)):
        found = definition.divergence(*pair, Objective(divergence))
        rare = (2000 - 745) / 2 if divergence == "log_tvd" else 0  # there it counts as any other
        assert found == pytest.approx(rare, abs=1e-12)


def test_log_tvd_by_hand_counts_all_ids_the_same_but_those_that_one_forbids():
    by_hand = (log(0.5 / 0.25) + log(0.75 / 0.5)) / 2
    found = definition.divergence(ONE_QUARTER, ONE_HALF, Objective("log_tvd"))
    assert found == pytest.approx(by_hand)
    student, teacher = np.log([[0.5, 0.5, 1e-300]]), np.log([[0.25, 0.75, 1e-300]])
    for forbids in (student, teacher):
        forbids[0, 2] = -np.inf
        assert definition.divergence(student, teacher, Objective("log_tvd")) == pytest.approx(
            by_hand
        )
    as_asked = Objective.from_table(ObjectiveTable(divergence="tvd", tvd_scale="log"))
    assert as_asked == Objective("log_tvd")
    assert Objective.from_table(ObjectiveTable(divergence="tvd")) == Objective("tvd")


def test_entropy_kl_is_both_kls_by_the_teachers_entropy():
    student, teacher, _ = random_logits(0)
    teacher[0], teacher[1] = 0.0, 40.0 * np.eye(9)[3]  # knows nothing, and is sure
    forward, reverse = (
        definition.divergence(student, teacher, Objective(name))
        for name in ("forward_kl", "reverse_kl")
    )
    t = np.exp(definition.log_softmax(teacher))
    entropy = -(t * np.log(t)).sum(axis=1)
    weight = entropy / (entropy + 0.7)
    found = definition.divergence(student, teacher, Objective("entropy_kl", entropy_half=0.7))
    assert found == pytest.approx(weight * forward + (1 - weight) * reverse)
    assert weight[0] == pytest.approx(log(9) / (log(9) + 0.7)) and weight[1] < 1e-12


def test_dkd_by_hand_and_the_weights_that_make_it_forward_kl():
    student, teacher = np.log([[0.5, 0.3, 0.2]]), np.log([[0.1, 0.6, 0.3]])
    target = 0.6 * log(0.6 / 0.3) + 0.4 * log(0.4 / 0.7)
    rest = 1 / 4 * log((1 / 4) / (5 / 7)) + 3 / 4 * log((3 / 4) / (2 / 7))
    objective = Objective("dkd", dkd_target=2.0, dkd_rest=8.0)
    found = definition.divergence(student, teacher, objective, np.array([1]))
    assert found == pytest.approx(2 * target + 8 * rest)
    forward = Objective("dkd", dkd_rest=0.4)  # 1 - the teacher's probability of the target
    for function in (definition.divergence, definition.divergence_grad):
        assert function(student, teacher, forward, np.array([1])) == pytest.approx(
            function(student, teacher, Objective())
        )


def test_jsd_is_bounded_symmetric_at_one_half_and_tends_to_both_kls():
    student, teacher, _ = random_logits(0)
    value = definition.divergence(student, teacher, Objective("jsd"))
    assert value == pytest.approx(definition.divergence(teacher, student, Objective("jsd")))
    far = np.array([[0.0, -np.inf]])
    assert definition.divergence(far, far[:, ::-1], Objective("jsd")) == pytest.approx(log(2))
    small = 1e-6
    for beta, limit in ((small, "forward_kl"), (1 - small, "reverse_kl")):
        ratio = definition.divergence(student, teacher, Objective("jsd", jsd_beta=beta)) / small
        assert ratio == pytest.approx(
            definition.divergence(student, teacher, Objective(limit)), rel=1e-4
        )


def test_skew_kl_by_hand_bounded_and_forward_kl_in_the_limit():
    by_hand = 0.5 * log(0.5 / (0.7 * 0.25 + 0.3 * 0.5)) + 0.5 * log(0.5 / (0.7 * 0.75 + 0.3 * 0.5))
    assert definition.divergence(
        ONE_QUARTER, ONE_HALF, Objective("skew_kl", skew_alpha=0.3)
    ) == pytest.approx(by_hand)
    forbids, gives = np.array([[0.0, -np.inf]]), np.array([[-np.inf, 0.0]])
    assert definition.divergence(forbids, gives, Objective("skew_kl")) == pytest.approx(
        log(10)
    )  # of α = 0.1, forward KL is infinite
    assert definition.divergence(forbids, gives, Objective("skew_reverse_kl")) == pytest.approx(
        log(10)
    )
    student, teacher, _ = random_logits(0)
    mirrored = definition.divergence(teacher, student, Objective("skew_reverse_kl"))
    assert mirrored == pytest.approx(definition.divergence(student, teacher, Objective("skew_kl")))
    nearly = definition.divergence(student, teacher, Objective("skew_kl", skew_alpha=1e-8))
    assert nearly == pytest.approx(definition.divergence(student, teacher, Objective()), rel=1e-5)


def test_mixed_kl_is_both_kls_by_their_weights():
    student, teacher, _ = random_logits(0)
    forward, reverse = (
        definition.divergence(student, teacher, Objective(name))
        for name in ("forward_kl", "reverse_kl")
    )
    mixed = definition.divergence(student, teacher, Objective("mixed_kl", mixed_weight=0.3))
    assert mixed == pytest.approx(0.3 * forward + 0.7 * reverse)
    assert np.abs(forward - reverse).max() > 0.1


def test_tvd_by_hand_bounded_and_symmetric():
    assert definition.divergence(ONE_QUARTER, ONE_HALF, Objective("tvd")) == pytest.approx(0.25)
    forbids, gives = np.array([[0.0, -np.inf]]), np.array([[-np.inf, 0.0]])
    assert definition.divergence(forbids, gives, Objective("tvd")) == 1
    student, teacher, _ = random_logits(0)
    swapped = definition.divergence(teacher, student, Objective("tvd"))
    assert definition.divergence(student, teacher, Objective("tvd")) == pytest.approx(swapped)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_zero_for_equal_models_positive_otherwise(divergence: str, temperature: float):
    student, teacher, targets = random_logits(1, scale=5)
    objective = Objective(divergence, 0.3, 1.0, temperature)
    same = definition.divergence(student, student + 7, objective, targets)
    assert same == pytest.approx(0, abs=1e-12)
    twin = student if "tvd" in divergence else student + 7  # its gradient jumps where s = t
    flat = definition.divergence_grad(student, twin, objective, targets)
    assert flat == pytest.approx(0, abs=1e-12)
    assert (definition.divergence(student, teacher, objective, targets) > 0).all()


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scaling", ["none", "hinton"])
@pytest.mark.parametrize("kd_weight", [0.0, 0.4, 1.0])
def test_gradients_are_finite_differences(
    divergence: str, temperature: float, scaling: str, kd_weight: float
):
    student, teacher, targets = random_logits(2)
    objective = Objective(divergence, 0.3, kd_weight, temperature, scaling)
    slope = finite_differences(
        lambda logits: definition.loss(logits, teacher, targets, objective), student
    )
    assert definition.grad(student, teacher, targets, objective) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_g_is_the_derivative_of_f(divergence: str):
    """For every id by itself, by central differences; twice the student's g is seen."""
    u, v = np.random.default_rng(7).uniform(-6, -0.01, size=(2, 5, 11))
    pair, step = DIVERGENCES[divergence], 1e-5
    slope = (pair(u + step, v, 0.3)[0] - pair(u - step, v, 0.3)[0]) / (2 * step)
    _, g = pair(u, v, 0.3)
    np.testing.assert_allclose(g, slope, rtol=0, atol=1e-9)
    assert np.abs(2 * g - slope).max() > 1e-3


@pytest.mark.parametrize("divergence", ALL)
def test_the_gradient_in_the_logits_is_central_differences(divergence: str):
    student, teacher, targets = random_logits(8)
    objective = Objective(divergence, 0.3, 1.0, dkd_target=0.7, dkd_rest=1.3)
    slope = finite_differences(
        lambda logits: definition.divergence(logits, teacher, objective, targets), student, 1e-5
    )
    np.testing.assert_allclose(
        definition.divergence_grad(student, teacher, objective, targets), slope, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("divergence", ALL)
def test_hinton_scales_value_and_gradient_by_temperature_squared(divergence: str):
    student, teacher, targets = random_logits(3)
    plain, hinton = (
        Objective(divergence, 0.3, 1.0, 3.0, scaling) for scaling in ("none", "hinton")
    )
    for function in (definition.divergence, definition.divergence_grad):
        assert function(student, teacher, hinton, targets) == pytest.approx(
            9 * function(student, teacher, plain, targets)
        )


def test_temperature_scales_both_logits_and_leaves_cross_entropy_alone():
    student, teacher, targets = random_logits(4)
    cold = definition.divergence(student / 3, teacher / 3, Objective())
    assert definition.divergence(
        student, teacher, Objective(temperature=3.0, temperature_scaling="none")
    ) == (pytest.approx(cold))
    warm = definition.loss(student, teacher, targets, Objective(kd_weight=0.0, temperature=3.0))
    assert warm == pytest.approx(definition.cross_entropy(student, targets))


@pytest.mark.parametrize("divergence", ALL)
def test_padding_of_minus_infinity_changes_nothing(divergence: str):
    student, teacher, targets = random_logits(5)
    objective = Objective(divergence, 0.3, 0.4, 2.0)
    padded = [np.pad(x, ((0, 0), (0, 3)), constant_values=-np.inf) for x in (student, teacher)]
    assert definition.loss(*padded, targets, objective) == pytest.approx(
        definition.loss(student, teacher, targets, objective)
    )
    slope = definition.grad(*padded, targets, objective)
    assert slope[:, :-3] == pytest.approx(definition.grad(student, teacher, targets, objective))
    assert not slope[:, -3:].any()


def test_the_ends_of_kd_weight_ignore_what_they_do_not_need():
    student, teacher, targets = random_logits(6)
    plain = Objective(kd_weight=0.0)
    assert not plain.needs_teacher and plain.needs_targets
    assert definition.loss(student, None, targets, plain) == pytest.approx(
        definition.cross_entropy(student, targets)
    )
    pure = Objective(kd_weight=1.0)
    assert pure.needs_teacher and not pure.needs_targets
    forbidden = np.where(
        np.arange(student.shape[1]) == targets[:, None], -np.inf, student
    )  # CE is infinite
    assert np.isfinite(definition.loss(teacher * 0, forbidden, targets, pure)).all()
    assert np.isfinite(definition.grad(forbidden, teacher, targets, pure)).all()


def test_hidden_distances_by_hand():
    student, teacher = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0]])
    assert definition.hidden_distance(student, teacher, "mse") == pytest.approx([1.0, 4.5])
    assert definition.hidden_distance(student, teacher, "cosine") == pytest.approx([1 / 25, 2.0])
    scaled = definition.hidden_distance(7 * student, teacher, "cosine")
    assert scaled == pytest.approx([1 / 25, 2.0])
    objective = Objective(kd_weight=0.5, hidden_weight=3.0)
    assert objective.total({"kd": 1.0, "ce": 2.0, "hidden": 4.0}) == 13.5
    assert objective.text_alone.weights == {"ce": 1.0}


@pytest.mark.parametrize(
    "layers, of_teacher, beside",
    [(4, 4, [1, 2, 3, 4]), (2, 3, [2, 3]), (3, 2, [1, 1, 2]), (4, 28, [7, 14, 21, 28])],
)
def test_a_layer_meets_the_one_at_its_share_of_the_depth(layers, of_teacher, beside):
    found = [definition.layer_beside(one + 1, layers, of_teacher) for one in range(layers)]
    assert found == beside


def test_a_table_becomes_an_objective():
    values = {
        "divergence": "jsd",
        "jsd_beta": 0.2,
        "skew_alpha": 0.4,
        "mixed_weight": 0.6,
        "entropy_half": 0.5,
        "dkd_target": 2.0,
        "dkd_rest": 8.0,
        "hidden_weight": 0.5,
        "hidden_distance": "cosine",
        "kd_weight": 0.7,
        "temperature": 2.0,
        "temperature_scaling": "none",
    }
    assert asdict(Objective.from_table(ObjectiveTable(**values))) == values
    assert Objective.from_table(ObjectiveTable()) == Objective()
    # what is learned, how it is computed, and which of two divergences tvd is
    elsewhere = {"segments", "chunk_tokens", "tvd_scale", "hidden_layers"}
    assert set(values) == set(ObjectiveTable.model_fields) - elsewhere
    assert set(get_args(Divergence)) == set(ALL) - {"log_tvd"}
