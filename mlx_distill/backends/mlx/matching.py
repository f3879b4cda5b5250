"""Hidden states of some layers, and how far a student's are from its teacher's, on MLX.

In: a split model and its layers, counted from 1. Out: what they gave at the loss positions, and rows
of distances. Decided here: where widths differ the student's states go through a matrix that trains
with it and is no part of it. The definition is `objective.py`'s. Axes: `N` loss positions, `D` width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.backends.matching import PROJECTION
from mlx_distill.backends.mlx.model import SplitModel, call_through


def of_student(weights: dict[str, Any]) -> dict[str, Any]:
    """What trains, without the matrices that are no part of the student."""
    return {name: part for name, part in weights.items() if name != PROJECTION}


class Watched:
    """Some layers of a model, which remember what they gave until it is taken."""

    def __init__(self, split: SplitModel, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._given: dict[int, mx.array] = {}
        for layer in set(layers):
            self._watch(split.layers[layer - 1], layer)

    def _watch(self, module: nn.Module, layer: int) -> None:
        def remembered(forward: Callable, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._given[layer] = output[0] if isinstance(output, tuple) else output
            return output

        call_through(module, remembered, "Watched")

    def taken(self, positions: np.ndarray) -> tuple[mx.array, ...]:
        """What the last pass gave at flat positions [N], [N, D] of each layer; it is forgotten."""
        places = mx.array(positions)
        found = tuple(
            given.reshape(-1, given.shape[-1])[places]
            for given in (self._given[layer] for layer in self.layers)
        )
        self.forget()
        return found

    def forget(self) -> None:
        """Hold nothing of the last pass."""
        self._given.clear()


def distance_rows(
    student: Sequence[mx.array],
    teacher: Sequence[mx.array],
    projections: Sequence[mx.array | None],
    kind: str,
) -> mx.array:
    """The mean over pairs of layers of their distance, float32[N]; a projection is [D, Dt]."""
    pairs = zip(student, teacher, projections, strict=True)
    return mx.mean(mx.stack([_distance(*pair, kind) for pair in pairs]), axis=0)


def _distance(
    student: mx.array, teacher: mx.array, projection: mx.array | None, kind: str
) -> mx.array:
    student, teacher = student.astype(mx.float32), teacher.astype(mx.float32)
    if projection is not None:
        student = student @ projection
    if kind == "mse":
        return mx.mean(mx.square(student - teacher), axis=-1)
    lengths = mx.sqrt(mx.sum(mx.square(student), -1) * mx.sum(mx.square(teacher), -1))
    return 1 - mx.sum(student * teacher, axis=-1) / mx.maximum(lengths, 1e-12)
