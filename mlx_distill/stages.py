"""The stages that may be made before a run, for any number of runs: the teacher's answers, texts that
a model writes, pruned models.

In: recipes. Out: folders. What is there already is not made again.
"""

from collections.abc import Sequence
from pathlib import Path

from mlx_distill.backends import choose_backend
from mlx_distill.backends.protocol import Backend
from mlx_distill.data.day import shared_day
from mlx_distill.errors import RecipeError
from mlx_distill.pipeline import Pipeline
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.teaching.of_recipe import asked_of_teacher, cache_of
from mlx_distill.view import View


def teach(recipes: Sequence[Recipe], view: View, backend_name: str = "auto") -> list[Path]:
    """Write or complete the teacher caches that recipes name, one pass for all that share one;
    returns the caches' folders.

    Raises `DistillError`.
    """
    for recipe in recipes:
        if recipe.teacher.cache == "off":
            raise RecipeError(
                f'{recipe.run.name}: [teacher] cache = "off" keeps nothing: set top_k, sampled or '
                "hidden, for example "
                "--set teacher.cache=top_k"
            )
    backend = choose_backend(backend_name)
    shared: dict[Path, list[Pipeline]] = {}
    for recipe in recipes:
        pipeline = _begun(recipe, view, backend)
        cache = cache_of(pipeline.pair, pipeline.day)
        shared.setdefault(cache.path, []).append(pipeline)
    pipeline.announce()
    for pipelines in shared.values():
        pipelines[0].fill_cache(
            [sequence for one in pipelines for sequence in asked_of_teacher(one.prepare())]
        )
    return list(shared)


def write(recipes: Sequence[Recipe], view: View, backend_name: str = "auto") -> list[Path]:
    """Write or complete the texts that recipes ask a model for, before they are run; returns the
    folders.

    Raises `DistillError`.
    """
    for recipe in recipes:
        if recipe.rollouts.by == "data" or recipe.rollouts.refresh_every:
            raise RecipeError(
                f'{recipe.run.name}: [rollouts] by = "{recipe.rollouts.by}", refresh_every = '
                f"{recipe.rollouts.refresh_every} leaves nothing to be written before a run: set "
                'by = "teacher" or "student", and refresh_every = 0'
            )
    backend = choose_backend(backend_name)
    folders = []
    for recipe in recipes:
        pipeline = _begun(recipe, view, backend)
        pipeline.announce()
        pipeline.prepare()
        assert pipeline.rollouts is not None  # nothing else was let in
        folders.append(pipeline.rollouts.folder)
    return folders


def prune(recipes: Sequence[Recipe], view: View, backend_name: str = "auto") -> list[Path]:
    """Make the pruned models that recipes' students begin as; returns their folders.

    Raises `DistillError`.
    """
    for recipe in recipes:
        if recipe.prune.thins and not recipe.prune.cuts:
            raise RecipeError(
                f"{recipe.run.name}: [prune] rounds = {recipe.prune.rounds} cuts while the student "
                "trains, so that nothing is made before: run the recipe, or set rounds = 0"
            )
        if not recipe.prune.cuts:
            raise RecipeError(
                f"{recipe.run.name}: [prune] cuts nothing: set layers, channels or kv_heads, for "
                "example --set prune.layers=15"
            )
    backend = choose_backend(backend_name)
    return [_begun(recipe, view, backend).prune() for recipe in recipes]


def _begun(recipe: Recipe, view: View, backend: Backend) -> Pipeline:
    """A recipe's stages, on the day that its runs share."""
    pipeline = Pipeline(recipe, view, backend)
    pipeline.choose_day(shared_day(RunFolder.of(recipe).path.parent))
    return pipeline
