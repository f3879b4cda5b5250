"""What `doctor` asks of torch: whether the loss is right here, and how fast matrices are multiplied."""

import time
from functools import partial

import numpy as np
import torch

from mlx_distill.backends import oracle
from mlx_distill.backends.torch.heads import MatrixHead
from mlx_distill.backends.torch.loss import kd_loss
from mlx_distill.objective import Objective


class TorchSelfTest:
    """Measured on `device`, products in `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(partial(_mean_loss, device=self._device))

    def matmul_rate(self, size: int = 0, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products; by default large enough to keep the
        device busy.
        """
        size = size or (8192 if self._device.type == "cuda" else 1024)
        left = torch.ones((size, size), dtype=self._dtype, device=self._device)
        (left @ left).sum().item()  # which waits for a GPU
        started = time.perf_counter()
        for _ in range(repeats):
            product = left @ left
        product.sum().item()
        return repeats * 2 * size**3 / (time.perf_counter() - started)


def _mean_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    matrix: np.ndarray,
    targets: np.ndarray,
    objective: Objective,
    device: torch.device,
) -> tuple[float, np.ndarray]:
    hidden, teacher_hidden, head, ids = (
        torch.from_numpy(array).to(device) for array in (student, teacher, matrix, targets)
    )
    rows = len(targets)
    weight = torch.ones(rows, device=device)
    loss = kd_loss(
        hidden.requires_grad_(),
        head,
        teacher_hidden,
        MatrixHead(head),
        ids,
        weight,
        objective,
        rows,
        4,
        False,
    ).loss
    loss.backward()
    return loss.item(), hidden.grad.cpu().numpy()
