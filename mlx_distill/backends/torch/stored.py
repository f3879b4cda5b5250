"""A student's tensors as files hold them: whole, whatever the ranks keep of them, in MLX's shapes.

In: trained tensors, sharded or not. Out: numpy arrays, and the tensors with what was kept. Decided
here: that an adapter's matrix is kept transposed, as mlx-lm has it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch.adapters import is_transposed


def gathered(arrays: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Any]:
    """All of them where `keep`; other ranks than the first help to make each one and drop it."""
    return {name: array for name, array in arrays if keep}


def whole(parameter: Tensor) -> Tensor:
    """The trained values; on the CPU if their shards had to be gathered, since a GPU may not hold
    all of them at once.
    """
    whole = together.whole(parameter.detach())
    return whole.cpu() if together.size() > 1 else whole


def kept_array(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor as a checkpoint holds it."""
    array = together.whole(tensor.detach()).cpu().numpy()
    return np.ascontiguousarray(array.T) if is_transposed(name) else array


def kept_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape)) if is_transposed(name) else tuple(tensor.shape)


def restore(tensor: Tensor, array: np.ndarray, name: str) -> None:
    array = np.ascontiguousarray(array.T) if is_transposed(name) else array
    tensor.detach().copy_(together.spread(torch.from_numpy(array), tensor))
