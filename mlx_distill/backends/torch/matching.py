"""Hidden states of some layers, and how far a student's are from its teacher's, on torch.

In: a split model and its layers, counted from 1. Out: what they gave at the loss positions, and rows
of distances. Decided here: where widths differ the student's states go through a matrix that trains
with it and is no part of it. The definition is `objective.py`'s. Axes: `N` loss positions, `D` width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlx_distill.backends.matching import PROJECTION
from mlx_distill.backends.torch.model import SplitModel


def of_student(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What trains, without the matrices that are no part of the student."""
    return {name: one for name, one in weights.items() if not name.startswith(f"{PROJECTION}.")}


class Watched:
    """Some layers of a model, which remember what they gave until it is taken."""

    def __init__(self, split: SplitModel, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._given: dict[int, Tensor] = {}
        for layer in set(layers):
            split.layers[layer - 1].register_forward_hook(partial(self._remember, layer))

    def _remember(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._given[layer] = output[0] if isinstance(output, tuple) else output

    def taken(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What the last pass gave at flat positions [N], [N, D] of each layer; it is forgotten."""
        found = tuple(
            given.reshape(-1, given.shape[-1])[positions]
            for given in (self._given[layer] for layer in self.layers)
        )
        self.forget()
        return found

    def forget(self) -> None:
        """Hold nothing of the last pass."""
        self._given.clear()


def distance_rows(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    kind: str,
) -> Tensor:
    """The mean over pairs of layers of their distance, float32[N]; a projection is [D, Dt]."""
    pairs = zip(student, teacher, projections, strict=True)
    return torch.stack([_distance(*pair, kind) for pair in pairs]).mean(0)


def _distance(student: Tensor, teacher: Tensor, projection: Tensor | None, kind: str) -> Tensor:
    student, teacher = student.float(), teacher.float()
    if projection is not None:
        student = student @ projection
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1, eps=1e-12)
