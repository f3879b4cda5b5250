"""What `doctor` asks of MLX: whether the loss is right here, and how fast matrices are multiplied."""

import time

import mlx.core as mx
import numpy as np

from mlx_distill.backends import oracle
from mlx_distill.backends.mlx.heads import MatrixHead
from mlx_distill.backends.mlx.loss import kd_loss
from mlx_distill.objective import Objective


class MlxSelfTest:
    """Measured on the default device, products in `dtype`."""

    def __init__(self, dtype: mx.Dtype):
        self._dtype = dtype

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(_mean_loss)

    def matmul_rate(self, size: int = 1024, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products."""
        left = mx.ones((size, size), self._dtype)
        mx.eval(left @ left)
        started = time.perf_counter()
        for _ in range(repeats):
            mx.eval(left @ left)
        return repeats * 2 * size**3 / (time.perf_counter() - started)


def _mean_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    matrix: np.ndarray,
    targets: np.ndarray,
    objective: Objective,
) -> tuple[float, np.ndarray]:
    head, rows = mx.array(matrix), len(targets)

    def total(hidden: mx.array) -> mx.array:
        kept, ids, weight = mx.array(teacher), mx.array(targets), mx.ones(rows)
        made = kd_loss(hidden, head, kept, MatrixHead(head), ids, weight, objective, rows, 4, False)
        return made.loss

    value, gradient = mx.value_and_grad(total)(mx.array(student))
    return value.item(), np.array(gradient)
