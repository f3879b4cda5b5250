"""The backends' self-check: right losses pass to the last place, wrong ones are far off, and a NaN
is the worst of all.
"""

import numpy as np
import pytest
from frameworks import Framework

from mlx_distill import objective as definition
from mlx_distill.backends import choose_backend, oracle


def exact(student, teacher, matrix, targets, objective) -> tuple[float, np.ndarray]:
    """The definition itself."""
    logits, teacher_logits = (x.astype(np.float64) @ matrix.T for x in (student, teacher))
    gradient = definition.grad(logits, teacher_logits, targets, objective) @ matrix / len(targets)
    return float(definition.loss(logits, teacher_logits, targets, objective).mean()), gradient


def test_the_definition_has_no_error():
    assert oracle.loss_error(exact) < 1e-14


def test_every_backend_passes(framework: Framework):
    assert 0 < choose_backend(framework.name).self_test().loss_error() < 1e-5


WRONG = {
    "a sum for a mean": lambda value, gradient: (value * oracle.ROWS, gradient),
    "the gradient of a sum": lambda value, gradient: (value, gradient * oracle.ROWS),
    "a flipped sign": lambda value, gradient: (value, -gradient),
    "one wrong row": lambda value, gradient: (
        value,
        gradient * (np.arange(oracle.ROWS) != 3)[:, None],
    ),
    "half a per cent": lambda value, gradient: (value * 1.005, gradient),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_far_off(wrong: str):
    assert oracle.loss_error(lambda *case: WRONG[wrong](*exact(*case))) > 4e-3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda value, gradient: (np.nan, gradient),
        lambda value, gradient: (value, gradient * np.nan),
    ],
)
def test_nan_wins(wrong):
    assert np.isnan(oracle.loss_error(lambda *case: wrong(*exact(*case))))


def test_float32_products_of_every_backend_are_exact(framework: Framework):
    assert choose_backend(framework.name).self_test().products().are_exact


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Float32 with so many bits, to nearest and to even."""
    below = 24 - bits
    whole = x.view(np.uint32).astype(np.uint64)
    to_even = (whole >> below) & 1
    nearest = whole + (1 << (below - 1)) - 1 + to_even
    return (nearest >> below << below).astype(np.uint32).view(np.float32)


def cut(x: np.ndarray, bits: int) -> np.ndarray:
    below = np.uint32(24 - bits)
    return (x.view(np.uint32) >> below << below).view(np.float32)


@pytest.mark.parametrize("shortened", [rounded, cut])
@pytest.mark.parametrize(("bits", "reduced"), [(8, False), (11, True)])
def test_eleven_bits_are_reduced_and_fewer_are_wrong(shortened, bits: int, reduced: bool):
    found = oracle.products(lambda left, right: shortened(left, bits) @ shortened(right, bits))
    assert found.are_reduced is reduced and not found.are_exact


@pytest.mark.parametrize(
    "wrong",
    [
        lambda left, right: (left @ right).astype(np.float16),
        lambda left, right: left @ right + np.float32(0.05),
        lambda left, right: left @ right * np.nan,
        lambda left, right: left @ right.T,
    ],
)
def test_wrong_products_are_neither(wrong):
    found = oracle.products(wrong)
    assert not found.are_exact and not found.are_reduced


def test_student_and_teacher_are_not_confused():
    def swapped(student, teacher, *rest):
        return exact(teacher, student, *rest)

    assert oracle.loss_error(swapped) > 0.1
