"""Weights as an MLX export to a few bits will round them, while they train.

In: float32 weights. Out: the same, each matrix whose rows are whole groups rounded as `mx.quantize`
rounds it. Decided here: the gradient passes as if nothing had been rounded (straight-through,
Bengio et al. 2013, as in quantisation-aware training, Jacob et al. 2018).
"""

from typing import Any

import torch
from torch import Tensor, nn

from mlx_distill.backends.torch.affine import Packing, dequantise, quantise

GROUP_SIZE = 64  # what `mlx.nn.quantize` and `mlx-distill export` take


def fits(tensor: Tensor) -> bool:
    """Whether an export rounds it: a matrix of whole groups."""
    return tensor.ndim == 2 and tensor.shape[-1] % GROUP_SIZE == 0


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """A weight as `bits` leave it; itself where `bits` is 0."""
    if not (bits and fits(tensor)):
        return tensor
    found: Tensor = _StraightThrough.apply(tensor, Packing(bits, GROUP_SIZE))
    return found


def rounded_parameters(module: nn.Module, bits: int) -> dict[str, Tensor]:
    """A module's parameters by name, for `torch.func.functional_call`."""
    return {name: rounded(parameter, bits) for name, parameter in module.named_parameters()}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, packing: Packing) -> Tensor:
        return dequantise(*quantise(tensor, packing), packing)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
