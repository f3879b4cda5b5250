"""Matrix products of the loss on torch: hidden states with a head, gradients with a head, gradients
with hidden states.

In: matrices in float32, or in half precision where a head is stored so. Out: float32. Decided here:
a half-precision head is promoted block by block on a CPU; on CUDA the products take its type and sum
in float32. Axes: `C` positions per chunk, `V` vocabulary, `D` width.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 8192  # of a half-precision head that are promoted at once on a CPU
# as in a last chunk: BLAS loses a decimal of their sums over a vocabulary (MKL: of one to three
# rows)
FEW_ROWS = 8


def project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 hidden @ weight.T, [C, V]; both in one half-precision type on CUDA are summed in
    float32.
    """
    if hidden.is_cuda:
        return product(hidden.to(weight.dtype), weight.T)
    out = torch.empty((len(hidden), len(weight))) if out is None else out
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=out)
    for start in range(0, len(weight), BLOCK_ROWS):
        block = weight[start : start + BLOCK_ROWS].float()
        out[:, start : start + len(block)] = hidden @ block.T
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """float32 left @ right; where `right` is in half precision on CUDA `left` is rounded to it, and
    promoted by block on a CPU.

    Few rows are multiplied by block in float32 too: a CPU's BLAS adds a whole vocabulary one after
    the other for them.
    """
    if right.dtype == torch.float32 and (left.is_cuda or len(left) > FEW_ROWS):
        return left @ right
    if left.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    size = BLOCK_ROWS if len(left) > FEW_ROWS else max(1, BLOCK_ROWS // 8)
    return sum(
        left[:, start : start + size] @ right[start : start + size].float()
        for start in range(0, len(right), size)
    )


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, in place; the first one replaces what `total` holds."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(product(left, right))
    else:
        total += product(left, right)
