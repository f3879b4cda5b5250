"""Several processes that train one student: who this one is, and sums over all.

In: the environment that `mlx.launch` sets. Each rank reads other micro-batches and holds the whole
student; gradients are summed. With one process everything here does nothing.
"""

import os
import platform
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.backends.mlx.weights import in_the_place_of
from mlx_distill.backends.protocol import Ranks

MESSAGE_BYTES = 32 * 2**20  # as mlx.nn.average_gradients has it
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # what `mlx.launch` sets, by its way of connecting


@cache
def join() -> Ranks:
    """The group that `mlx.launch` started this process for; alone where none did."""
    if not any(name in os.environ for name in LAUNCHED):
        return Ranks()
    group = mx.distributed.init()
    return Ranks(group.rank(), group.size())


def on_this_machine() -> int:
    """How many ranks of the group run on this machine, this one included."""
    if join().size == 1:
        return 1
    mine = zlib.crc32(platform.node().encode()) >> 1  # int32
    machines = mx.distributed.all_gather(mx.array([mine], mx.int32))
    return int((np.array(machines) == mine).sum())


def sum_gradients(gradients: dict) -> dict:
    """Summed: the loss was divided by the tokens of all ranks.

    They are put together into messages of `MESSAGE_BYTES` at least, of one format each; many small
    ones wait for each other. Sums are computed before they are returned: a GPU that waits in its
    own queue for another rank is taken for one that hangs.
    """
    if join().size == 1:
        return gradients
    summed: dict[str, mx.array] = {}
    for group in _messages(tree_flatten(gradients)):
        message = mx.concatenate([array.reshape(-1) for _, array in group])
        mx.eval(message)
        message = mx.distributed.all_sum(message)
        mx.eval(message)
        edges = list(accumulate(array.size for _, array in group))
        parts = mx.split(message, edges[:-1])
        for (key, array), part in zip(group, parts, strict=True):
            summed[key] = part.reshape(array.shape)
    return in_the_place_of(gradients, summed)


def _messages(arrays: list[tuple[str, mx.array]]) -> Iterator[list[tuple[str, mx.array]]]:
    """Neighbours of one format, until there are enough of them."""
    group: list[tuple[str, mx.array]] = []
    for key, array in arrays:
        if group and (
            array.dtype != group[0][1].dtype or sum(one.nbytes for _, one in group) >= MESSAGE_BYTES
        ):
            yield group
            group = []
        group.append((key, array))
    if group:
        yield group


def all_sum(values: np.ndarray) -> np.ndarray:
    """The sum of float64 `values` over all ranks, on each; counts are exact, sums of losses are
    rounded to float32 twice.
    """
    if join().size == 1:
        return values
    high = np.asarray(values, np.float64).astype(np.float32)
    low = (values - high).astype(np.float32)  # MLX sums no float64 on a GPU
    both = mx.distributed.all_sum(mx.array(np.stack([high, low])))
    return np.sum(np.array(both, np.float64), axis=0)
