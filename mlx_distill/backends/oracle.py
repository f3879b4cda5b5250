"""A tiny loss whose float64 answer is known: the self-check of every backend."""

from collections.abc import Callable

import numpy as np

from mlx_distill import objective as definition
from mlx_distill.objective import Objective

Loss = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray, Objective], tuple[float, np.ndarray]
]
ROWS, WIDTH, VOCABULARY = 11, 8, 50


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
