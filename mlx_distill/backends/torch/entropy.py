"""How unsure a model is at some positions, on torch, walked over chunks as the loss is.

In: hidden states of N positions and the head that makes logits of them. Out: the entropy at each.
Nothing is kept for a gradient. Axes: `N` positions, `D` width.
"""

import torch
from torch import Tensor

from mlx_distill.backends.chunks import even_chunk
from mlx_distill.backends.torch.heads import FLOOR, Head


@torch.no_grad()
def entropy_rows(hidden: Tensor, head: Head, chunk_tokens: int, vocab: int) -> Tensor:
    """Entropy in nats at temperature 1 over the first `vocab` ids, float32[N], of hidden states [N,
    D].
    """
    if not len(hidden):
        return hidden.new_zeros((0,), dtype=torch.float32)
    size = even_chunk(len(hidden), chunk_tokens)
    rows = []
    for start in range(0, len(hidden), size):
        inputs = hidden[start : start + size]
        logits = head.logits(inputs if inputs.is_cuda else inputs.float(), vocab).clamp_(min=FLOOR)
        log_probs = logits.log_softmax(1)
        rows.append(-torch.linalg.vecdot(torch.exp(log_probs, out=logits), log_probs))
    return torch.cat(rows)
