"""Defaults that follow another field.

In: a recipe, and which of its fields were set. Out: a value for each field of `FOLLOWS` that was
not. They are filled in when a recipe is read, so that a run's recipe.toml says what was trained
with; a field that is set stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_distill.recipe.recipe import Recipe


@dataclass(frozen=True)
class Following:
    """A default as a function of the other fields, and the words for it in the reference."""

    value: Callable[["Recipe"], float | str]
    words: str


def _sort_window(recipe: "Recipe") -> int:
    """Eight steps where sorting them saves padding and a step still holds short and long examples."""
    batch = recipe.batch
    several = 1 < batch.micro_batch_size <= batch.global_batch_size // 2
    return 8 if several and batch.shuffle and not recipe.rollouts.refresh_every else 1


FOLLOWS = {
    "student.model": Following(
        lambda recipe: recipe.teacher.model if recipe.student.from_teacher else "",
        "teacher.model with from_teacher",
    ),
    "student.revision": Following(
        lambda recipe: recipe.teacher.revision if recipe.student.from_teacher else "main",
        "teacher.revision with from_teacher",
    ),
    "student.alpha": Following(lambda recipe: 2.0 * recipe.student.rank, "2 × rank"),
    "optim.learning_rate": Following(
        lambda recipe: 2e-5 if recipe.student.tuning == "full" else 2e-4,
        '2e-4 with tuning = "lora" or "dora"',
    ),
    "batch.sort_window": Following(
        _sort_window,
        "1 where a step is one micro-batch, or a micro-batch one sequence, with shuffle = false, "
        "and with rollouts.refresh_every",
    ),
    "objective.kd_weight": Following(
        lambda recipe: 1.0 if recipe.rollouts.by == "student" else 0.5,
        '1.0 with rollouts.by = "student"',
    ),
    "optim.schedule": Following(
        lambda recipe: "constant" if recipe.optim.schedule_free else "one_cycle",
        'constant with optimizer = "schedule_free_adamw"',
    ),
    "optim.beta2": Following(
        lambda recipe: 0.99 if recipe.optim.optimizer == "lion" else 0.999,
        '0.99 with optimizer = "lion"',
    ),
}


def following(recipe: "Recipe") -> dict[str, dict[str, Any]]:
    """Table → field → value, for the fields of `FOLLOWS` that the recipe does not set."""
    found: dict[str, dict[str, Any]] = {}
    for path, rule in FOLLOWS.items():
        table, field = path.split(".")
        if field not in getattr(recipe, table).model_fields_set:
            found.setdefault(table, {})[field] = rule.value(recipe)
    return found
