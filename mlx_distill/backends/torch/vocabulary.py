"""What the loss does over the whole vocabulary of some positions on torch: log-softmax, the most
likely id, one id of each.

Axes: `C` positions, `V` vocabulary.
"""

import torch
from torch import Tensor

ARGMAX_IDS = 512  # of a vocabulary that are searched at once on a CPU


def log_softmax(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten._log_softmax.out(x, 1, False, out=out)


def most_likely(logits: Tensor) -> Tensor:
    """The first most likely id of each row, int64[C, 1].

    A CPU's argmax takes four times as long as its amax: the maxima of ranges of ids say which range
    to search.
    """
    size = ARGMAX_IDS
    if torch.compiler.is_compiling() or logits.is_cuda or logits.shape[1] < 2 * size:
        return logits.argmax(1, keepdim=True)
    ranges = [part.amax(-1) for part in _ranges(logits, size)]
    first = torch.cat(ranges, 1).argmax(1, keepdim=True)
    start = (first * size).clamp(max=logits.shape[1] - size)
    window = logits.gather(1, start + torch.arange(size))
    return start + window.argmax(1, keepdim=True)


def _ranges(logits: Tensor, size: int) -> list[Tensor]:
    """`logits` [C, V] as views [C, V // size, size] and, if something is left, [C, 1, V % size]."""
    even = logits.shape[1] // size * size
    views = [logits[:, :even].unflatten(1, (-1, size)), logits[:, None, even:]]
    return [view for view in views if view.shape[2]]


def add_at(x: Tensor, ids: Tensor, amount: float | Tensor) -> None:
    """`amount`, one number or [C, 1], more at one id of each row; a compiler fuses the comparison,
    while scattering would have it write [C, V] and read it.
    """
    if torch.compiler.is_compiling():
        x.add_(_is(x, ids).to(x.dtype) * amount)
    else:
        x.scatter_add_(1, ids, amount if isinstance(amount, Tensor) else _column(x, amount))


def set_at(x: Tensor, ids: Tensor, value: float) -> None:
    """`value` at one id of each row."""
    if torch.compiler.is_compiling():
        x.masked_fill_(_is(x, ids), value)
    else:
        x.scatter_(1, ids, value)


def _is(x: Tensor, ids: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) == ids


def _column(x: Tensor, value: float) -> Tensor:
    return x.new_full((len(x), 1), value)
