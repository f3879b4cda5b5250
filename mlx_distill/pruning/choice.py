"""Which parts of a model stay.

In: `[prune]`, a model's sizes and, where they decide, its activations on some texts. Out: `Kept`.
Decided here: the most active ones stay, in their order, as many in each block; equals go by their
number, the first ones stay.
"""

import numpy as np

from mlx_distill.backends.activations import Activations
from mlx_distill.errors import RecipeError
from mlx_distill.models.prune import Kept, Sizes, evenly
from mlx_distill.recipe.tables import PruneTable


def refuse_larger(table: PruneTable, sizes: Sizes, name: str) -> None:
    """Raise `RecipeError` where more is to stay than there is."""
    for field in ("layers", "channels", "kv_heads"):
        stay, there = getattr(table, field), getattr(sizes, field)
        if stay > there:
            raise RecipeError(
                f"[prune] {field} = {stay} is more than {name} has, which is {there}: lower it, or "
                "0 to keep all"
            )


def chosen(table: PruneTable, sizes: Sizes, activations: Activations | None) -> Kept:
    """What stays; `activations` are needed where `table` chooses by them."""
    if not table.layers:
        layers = tuple(range(sizes.layers))
    elif table.layers_by == "position":
        layers = evenly(sizes.layers, table.layers)
    else:
        assert activations is not None
        layers = tuple(map(int, most(activations.change, table.layers)))
    channels, kv_heads = {}, {}
    if table.channels:
        assert activations is not None
        channels = {layer: most(activations.channels[layer], table.channels) for layer in layers}
    if table.kv_heads:
        assert activations is not None
        by_head = activations.of_kv_heads(sizes.kv_heads)
        kv_heads = {layer: most(by_head[layer], table.kv_heads) for layer in layers}
    return Kept(layers, channels, kv_heads)


def most(sizes: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest, ascending."""
    return np.sort(np.argsort(-sizes, kind="stable")[:count])
