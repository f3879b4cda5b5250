"""A batch → the same batch with the positions that a rule chose by what a model says of them.

In: a batch in which every candidate carries loss, a score for each, the `[selection]` table. Out: a
batch with fewer positions, and where they stood. Decided here: nothing but the order among equals;
how many are chosen is `selection.py`'s.
"""

from dataclasses import replace

import numpy as np

from mlx_distill.data.batches import Batch, padded
from mlx_distill.data.selection import chosen_count, place_weights, places_in_rows
from mlx_distill.recipe.training_tables import SelectionTable


def narrowed(
    batch: Batch, scores: np.ndarray, table: SelectionTable, multiple: int
) -> tuple[Batch, np.ndarray]:
    """The batch with those positions of each row whose scores float[taught] are highest, the first
    of equals, and the places among the old positions at which the teacher's answers to the new ones
    lie.
    """
    taught = batch.taught
    asked = np.flatnonzero(batch.weight[:taught])
    rows = batch.positions[asked] // batch.tokens.shape[1]
    ranked = np.lexsort((asked, -scores[asked], rows))
    count, place = places_in_rows(rows[ranked])
    chosen = np.sort(asked[ranked[place < chosen_count(table.share, count)]])
    weights = place_weights(table.position_weight, batch.positions[chosen] // batch.tokens.shape[1])
    after = taught + np.flatnonzero(batch.weight[taught:])
    places = np.concatenate([chosen, after])
    weight = batch.weight[places] * np.concatenate([weights, np.ones(len(after), np.float32)])
    left = replace(
        batch,
        positions=padded(batch.positions[places], multiple),
        targets=padded(batch.targets[places], multiple),
        segment=padded(batch.segment[places], multiple),
        weight=padded(weight, multiple),
    )
    return left, padded(places, multiple)[: left.taught]
