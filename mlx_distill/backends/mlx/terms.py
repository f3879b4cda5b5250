"""What a chunk of positions is told by its logits on MLX, whatever is asked of the teacher.

`dense.py`, `decoupled.py` and `sparse.py` make it of a chunk's first pass over the vocabulary; the
second pass of `loss.py` takes the gradient from it. Axes: `C` positions per chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

Logits = Callable[[int, int, list[mx.array]], mx.array]  # of a block, computed after some arrays


class Terms(NamedTuple):
    """Columns [C, 1] in nats, nats, 0 or 1. `gradient(block, share)` is `share` [C, 1] times the
    loss's gradient with respect to a block's logits, all but what the targets take from it.
    """

    kd: mx.array
    ce: mx.array
    agree: mx.array
    gradient: Callable[[int, mx.array], mx.array]
