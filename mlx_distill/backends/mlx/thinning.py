"""Parts of a student that go while it trains, as zeros: see `pruning/thinning.py`.

In: weights, and what the optimizer remembers of them, nested by the parts of their names. Out: both
with zeros where a channel or a head does not stay. What an optimizer keeps in another shape than
the weight's, sums of rows and columns, stays as it is.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.models.prune import Kept, Sizes, gone


def thinned(weights: Any, state: Any, kept: Kept, sizes: Sizes) -> tuple[Any, Any]:
    """(weights, optimizer's state), evaluated."""
    shapes = {key: array.shape for key, array in tree_flatten(weights)}
    parts = gone(shapes, kept, sizes)

    def zeroed(path: str, array: mx.array) -> mx.array:
        name = path if path in parts else path.rpartition(".")[0]  # state: name.m, name.v
        if name not in parts or array.shape != shapes[name]:
            return array
        axis, places = parts[name]
        stays = np.ones([length if i == axis else 1 for i, length in enumerate(array.shape)], bool)
        stays.ravel()[places] = False
        return mx.where(mx.array(stays), array, mx.zeros_like(array))

    found = tree_map_with_path(zeroed, weights), tree_map_with_path(zeroed, state)
    mx.eval(found)
    return found
