"""A tiny loss and a product of matrices whose float64 answers are known: the self-check of every
backend.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_distill import objective as definition
from mlx_distill.objective import Objective

Loss = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray, Objective], tuple[float, np.ndarray]
]
Multiply = Callable[[np.ndarray, np.ndarray], np.ndarray]
ROWS, WIDTH, VOCABULARY = 11, 8, 50
SIZE = 256  # of the matrices of a product
EXACT = 1e-5  # float32 gives 1e-7 of the largest number
# operands of 11 bits give 3e-4, or 8e-4 where they are cut and not rounded; of 8 bits 2e-3
# (`tests/backends/test_oracle.py` does that to them in numpy)
ELEVEN_BITS = 1e-3


@dataclass(frozen=True)
class Products:
    """How far float32 products are from float64's, relative to the largest number: of operands of 8
    bits, as bfloat16 has, and of 24.

    Some GPUs (Apple's M5, NVIDIA's) keep 11 bits of float32 operands and add in float32: products
    of bfloat16 values are exact there, others are off by a known rounding.
    """

    short: float
    whole: float

    @property
    def are_exact(self) -> bool:
        return self.short < EXACT and self.whole < EXACT

    @property
    def are_reduced(self) -> bool:
        return self.short < EXACT <= self.whole < ELEVEN_BITS


def products(multiply: Multiply) -> Products:
    """Of a function that multiplies float32 matrices [M, K] and [K, N]."""
    random = np.random.default_rng(0)
    left, right = (random.normal(size=(SIZE, SIZE)).astype(np.float32) for _ in range(2))

    def error(left: np.ndarray, right: np.ndarray) -> float:
        expected = left.astype(np.float64) @ right.astype(np.float64)
        return float(np.abs(multiply(left, right) - expected).max() / np.abs(expected).max())

    return Products(error(_with_8_bits(left), _with_8_bits(right)), error(left, right))


def _with_8_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def loss_error(loss: Loss) -> float:
    """Largest relative error of a mean loss and its gradient against `objective.py`, on eleven
    random positions.

    `loss(student [N, D], teacher [N, D], matrix [V, D], targets [N], objective)` returns the mean
    and d mean / d student [N, D]; both models have the head `matrix`.
    """
    random, objective = np.random.default_rng(0), Objective()
    student, teacher, matrix = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((ROWS, WIDTH), (ROWS, WIDTH), (VOCABULARY, WIDTH))
    )
    targets = random.integers(0, VOCABULARY, ROWS).astype(np.int32)
    value, gradient = loss(student, teacher, matrix, targets, objective)
    logits, teacher_logits = (
        student.astype(np.float64) @ matrix.T,
        teacher.astype(np.float64) @ matrix.T,
    )
    expected = definition.loss(logits, teacher_logits, targets, objective).mean()
    expected_gradient = definition.grad(logits, teacher_logits, targets, objective) @ matrix / ROWS
    error = np.abs(gradient - expected_gradient).max() / np.abs(expected_gradient).max()
    return float(np.max([error, abs(value - expected) / expected]))  # a NaN wins
