"""What `doctor` asks of torch: whether the loss is right here, and how fast matrices are multiplied."""

import time
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from mlx_distill.backends import oracle
from mlx_distill.backends.oracle import Products
from mlx_distill.backends.torch.heads import MatrixHead
from mlx_distill.backends.torch.loss import kd_loss
from mlx_distill.objective import Objective


class TorchSelfTest:
    """Measured on `device`, products in `dtype`."""

    exact_environment: Mapping[str, str] = {
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
        "NVIDIA_TF32_OVERRIDE": "0",
    }

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(partial(_mean_loss, device=self._device))

    def products(self) -> Products:
        def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            ours, other = (torch.from_numpy(x).to(self._device) for x in (left, right))
            return (ours @ other).cpu().numpy()

        return oracle.products(multiply)

    def limits(self) -> dict[str, int]:
        """Bytes by what they limit; nothing on a CPU."""
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {"GPU's memory": total, "free now": free}

    def matmul_size(self) -> int:
        """Of a product that is large enough to keep the device busy."""
        return 8192 if self._device.type == "cuda" else 1024

    def matmul_rate(self, size: int = 0, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products; by default of `matmul_size`."""
        size = size or self.matmul_size()
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
