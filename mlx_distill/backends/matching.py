"""Which hidden states are compared, on every backend: which layer stands beside which, and the
matrices that make a student's states as wide as the teacher's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlx_distill.backends import refusals
from mlx_distill.backends.adapters import initial_matrix
from mlx_distill.objective import layer_beside
from mlx_distill.recipe.recipe import Recipe

PROJECTION = "hidden_projection"  # what trains beside the student, in a checkpoint's names


class Matched(NamedTuple):
    """The student's `layers` and the teacher's that stand beside them, counted from 1, and by the
    student's layer the projection [D, Dt] before training, where widths differ.
    """

    layers: tuple[int, ...]
    of_teacher: tuple[int, ...]
    projections: dict[str, np.ndarray]


class Measured(Protocol):
    """A split model, as far as its sizes are asked for."""

    name: str

    @property
    def layers(self) -> Any: ...

    @property
    def width(self) -> int: ...


def matched(recipe: Recipe, student: Measured, teacher: Measured) -> Matched:
    """What a recipe compares of these two. Raises `ModelError` as `chosen_layers` does."""
    layers, of_teacher = len(student.layers), len(teacher.layers)
    chosen = chosen_layers(recipe, layers, student.name)
    projections = first_projections(chosen, student.width, teacher.width, recipe.run.seed)
    return Matched(chosen, beside(chosen, layers, of_teacher), projections)


def chosen_layers(recipe: Recipe, layers: int, name: str) -> tuple[int, ...]:
    """The student's layers, counted from 1. Raises `ModelError` where it has fewer."""
    chosen = recipe.objective.hidden_layers or (layers,)
    if max(chosen) > layers:
        raise refusals.no_such_layer(name, max(chosen), layers)
    return chosen


def beside(chosen: Sequence[int], layers: int, of_teacher: int) -> tuple[int, ...]:
    """The teacher's layers that they meet."""
    return tuple(layer_beside(layer, layers, of_teacher) for layer in chosen)


def first_projections(
    chosen: Sequence[int], width: int, of_teacher: int, seed: int
) -> dict[str, np.ndarray]:
    """By layer, [D, Dt] before training; none where the widths are one."""
    if width == of_teacher:
        return {}
    shape = width, of_teacher
    return {str(one): initial_matrix(shape, f"{PROJECTION}.{one}", seed) for one in chosen}
