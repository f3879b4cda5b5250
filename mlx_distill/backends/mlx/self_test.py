"""What `doctor` asks of MLX: whether the loss is right here, and how fast matrices are multiplied."""

import time
from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from mlx_distill.backends import oracle
from mlx_distill.backends.mlx.heads import MatrixHead
from mlx_distill.backends.mlx.loss import kd_loss
from mlx_distill.backends.oracle import Products
from mlx_distill.objective import Objective

SMALLEST, LARGEST = 256, 4096  # rows of the matrices whose product is timed
A_WHILE_SECONDS = 0.02  # a GPU of 8 TFLOP/s needs it for a product of the largest


class MlxSelfTest:
    """Measured on the default device, products in `dtype`."""

    exact_environment: Mapping[str, str] = {"MLX_ENABLE_TF32": "0"}

    def __init__(self, dtype: mx.Dtype):
        self._dtype = dtype

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(_mean_loss)

    def products(self) -> Products:
        return oracle.products(lambda left, right: np.array(mx.array(left) @ mx.array(right)))

    def limits(self) -> dict[str, int]:
        """Bytes by what they limit, as MLX has them now; nothing where it computes on a CPU."""
        if mx.default_device().type != mx.DeviceType.gpu:
            return {}
        info = mx.device_info()
        said = {
            "GPU's working set": info.get("max_recommended_working_set_size"),
            "largest buffer": info.get("max_buffer_length"),
            "MLX's cache limit": _now(mx.set_cache_limit),
            "wired limit": _now(mx.set_wired_limit),
        }
        return {name: int(limit) for name, limit in said.items() if limit is not None}

    def matmul_size(self) -> int:
        """Of the smallest product that takes a while here, and at most `LARGEST`."""
        size = SMALLEST
        while size < LARGEST and _seconds(size, 1, self._dtype) < A_WHILE_SECONDS:
            size *= 2
        return size

    def matmul_rate(self, size: int = 0, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products in one evaluation; by default of
        `matmul_size`.
        """
        size = size or self.matmul_size()
        return repeats * 2 * size**3 / _seconds(size, repeats, self._dtype)


def _seconds(size: int, repeats: int, dtype: mx.Dtype) -> float:
    """Of so many products, each of which needs the one before."""
    left = mx.full((size, size), 1 / size, dtype)  # its own product
    mx.eval(left @ left)
    product = left
    for _ in range(repeats):
        product = left @ product
    started = time.perf_counter()
    mx.eval(product)
    return time.perf_counter() - started


def _now(set_limit: Callable[[int], int]) -> int:
    """A limit as it is: it is said when it is set."""
    limit = set_limit(0)
    set_limit(limit)
    return limit


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
