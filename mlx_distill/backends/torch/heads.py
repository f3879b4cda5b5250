"""What the loss reads logits from on torch: a frozen head, or what a cache kept of a teacher.

In: hidden states of some positions. Out: float32 logits of the first ids. Axes: `N` loss positions,
`C` positions per chunk, `V` vocabulary, `D` width, `K` kept teacher tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from mlx_distill.backends.torch.affine import AffineLinear, TiedHead
from mlx_distill.backends.torch.products import project

# replaces logits of -inf, whose differences are NaN; its probability is 0 and 0 * FLOOR is 0
FLOOR = -1e9

Finish = Callable[[Tensor], Tensor]


class Head(Protocol):
    """A frozen projection to the vocabulary."""

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        """float32 logits [C, rows] of the first `rows` ids from hidden states [C, D], in `out` if
        that suits.
        """


@dataclass(frozen=True)
class MatrixHead:
    """`finish(hidden @ weight.T + bias)`, weight [V, D] in any float type; finish is elementwise
    (cap, scale).
    """

    weight: Tensor
    bias: Tensor | None = None
    finish: Finish | None = None

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        logits = project(hidden, self.weight[:rows], out)
        if self.bias is not None:
            logits += self.bias[:rows].float()
        return logits if self.finish is None else self.finish(logits).float()


@dataclass(frozen=True)
class AffineHead:
    """The same with a packed matrix, which is made for each product."""

    module: AffineLinear | TiedHead
    bias: Tensor | None = None
    finish: Finish | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.matrix()

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        return MatrixHead(self.weight, self.bias, self.finish).logits(hidden, rows, out)


@dataclass(frozen=True)
class CallableHead:
    """Any function from hidden states [C, D] to logits [C, V or more]."""

    function: Callable[[Tensor], Tensor]

    def logits(self, hidden: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
        return self.function(hidden)[:, :rows].float()


class SparseHead(NamedTuple):
    """`SparseTargets` as tensors: what takes the place of the teacher's head where only K of its
    answers [N, K] are known.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    offset: Tensor
    top: Tensor

    def rows(self, place: slice) -> "SparseHead":
        return SparseHead(*(column[place] for column in self))
