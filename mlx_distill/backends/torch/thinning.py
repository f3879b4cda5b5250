"""Parts of a student that go while it trains, as zeros: see `pruning/thinning.py`.

What an optimizer keeps in another shape than the weight's, sums of rows and columns, stays as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlx_distill.backends.torch.adapters import canonical
from mlx_distill.models.prune import Kept, Sizes, gone


@torch.no_grad()
def thin(
    weights: Mapping[str, Tensor], state: Mapping[Tensor, Any], kept: Kept, sizes: Sizes
) -> None:
    """Zero, in place, what does not stay of the weights by name and of the optimizer's state."""
    named = {canonical(name): weight for name, weight in weights.items()}
    for name, (axis, places) in gone(named, kept, sizes).items():
        weight = named[name]
        index = torch.from_numpy(places).to(weight.device)
        remembered = state[weight].values() if weight in state else ()
        for one in (weight, *remembered):
            if isinstance(one, Tensor) and one.shape == weight.shape:
                one.index_fill_(axis, index, 0.0)
