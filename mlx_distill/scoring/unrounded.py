"""What a score tells of a student that learned with its weights rounded: they are not rounded yet."""

from collections.abc import Mapping

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.scoring.score import Score


def unrounded_note(recipe: Recipe, scores: Mapping[str, Score]) -> str:
    """That the student was scored without the rounding that it learned for; "" for any other."""
    bits = recipe.student.quantize_aware_bits
    if not bits or "student" not in scores:
        return ""
    return (
        f"the student learned to be rounded to {bits} bits, and was scored here before that: "
        f"`mlx-distill export` with `--to mlx-{bits}bit` rounds it and scores it again"
    )
