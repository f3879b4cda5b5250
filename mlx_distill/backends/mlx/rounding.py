"""Weights as an MLX export to a few bits will round them, while they train.

In: float32 weights. Out: the same, each matrix whose rows are whole groups rounded as `mx.quantize`
rounds it. Decided here: the gradient passes as if nothing had been rounded (straight-through,
Bengio et al. 2013, as in quantisation-aware training, Jacob et al. 2018).
"""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

GROUP_SIZE = 64  # what `mlx.nn.quantize` and `mlx-distill export` take


def fits(array: mx.array) -> bool:
    """Whether an export rounds it: a matrix of whole groups."""
    return array.ndim == 2 and array.shape[-1] % GROUP_SIZE == 0


def rounded(weights: Any, bits: int) -> Any:
    """A tree of weights, or one array, as `bits` leave it; itself where `bits` is 0."""
    if not bits:
        return weights

    @mx.custom_function
    def straight_through(array: mx.array) -> mx.array:
        packed = mx.quantize(array, GROUP_SIZE, bits)
        return mx.dequantize(*packed, GROUP_SIZE, bits)

    @straight_through.vjp
    def _(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent

    return tree_map(lambda array: straight_through(array) if fits(array) else array, weights)
