"""Which settings of a recipe make no sense together.

In: a recipe whose fields are each well formed. Out: for every contradiction one line that names the
fields, what was found and what to change. Only what the recipe itself says is judged; no file is
looked for.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_distill import readers
from mlx_distill.errors import RecipeError

if TYPE_CHECKING:
    from mlx_distill.recipe.recipe import Recipe

LONGEST_NAME = 200  # bytes of a run's name; the files beside its folder have longer ones


def contradictions(recipe: "Recipe") -> Iterator[str]:
    """The lines of all contradictions, the ones to mend first in front."""
    teacher, objective, truncation = recipe.teacher, recipe.objective, recipe.truncation
    batch, run, scoring = recipe.batch, recipe.run, recipe.eval
    if not recipe.student.model:
        yield "[student] model is empty: name a hub id, a folder, a .gguf or embedded:student"
    yield from _wrong_paths(recipe)
    if not recipe.data.source:
        yield "[data] source is empty: name a file, a hub dataset or embedded:dial"
    if not teacher.model and objective.kd_weight > 0:
        yield (
            f"[teacher] model is empty but [objective] kd_weight is {objective.kd_weight}: name a "
            "teacher or set kd_weight = 0"
        )
    yield from cache_contradictions(recipe, teacher.cache)
    if truncation.keep == "cot" and truncation.fraction != 1:
        yield (
            '[truncation] keep = "cot" cuts after </think> and takes no fraction, found '
            f"{truncation.fraction}: set fraction = 1.0"
        )
    if batch.micro_batch_size > batch.global_batch_size:
        yield (
            f"[batch] micro_batch_size {batch.micro_batch_size} exceeds global_batch_size "
            f"{batch.global_batch_size}: lower the first or raise the second"
        )
    if run.export == "best" and run.keep_checkpoints == "last":
        yield (
            '[run] export = "best" needs the best checkpoint, but keep_checkpoints = "last" drops '
            'it: set export = "last" or keep_checkpoints = "last_and_best"'
        )
    if scoring.samples > 1 and scoring.temperature == 0:
        yield (
            f"[eval] samples = {scoring.samples} at temperature 0 would repeat one greedy answer: "
            "raise temperature"
        )


def cache_contradictions(recipe: "Recipe", kind: str) -> Iterator[str]:
    """What a cache of this kind cannot serve: it holds answers for whole sequences, at temperature
    1.
    """
    objective, truncation = recipe.objective, recipe.truncation
    if kind == "off":
        return
    asked = f'[teacher] cache = "{kind}"'
    if not recipe.teacher.cache_folder:
        yield f"{asked} needs a place, but cache_folder is empty: name a folder"
    if objective.kd_weight == 0:
        yield (
            f"{asked} keeps a teacher's answers, but [objective] kd_weight = 0 uses none: set "
            'cache = "off"'
        )
    cuts = truncation.fraction < 1 or truncation.max_tokens > 0
    if cuts and truncation.keep in ("suffix", "middle") and truncation.context == "drop":
        yield (
            f"{asked} holds answers to whole sequences, but [truncation] keep = "
            f'"{truncation.keep}" drops the context and asks others: '
            'set context = "keep", keep = "prefix", or cache = "off"'
        )
    if kind in ("top_k", "sampled") and objective.temperature != 1:
        yield (
            f"{asked} holds answers at temperature 1, but [objective] temperature is "
            f'{objective.temperature}: set 1.0, or cache = "hidden"'
        )
    if kind == "sampled" and objective.divergence != "forward_kl":
        yield (
            f"{asked} is unbiased for forward_kl alone, but [objective] divergence is "
            f'"{objective.divergence}": set forward_kl, or cache = "top_k"'
        )


def cache_serves(recipe: "Recipe", kind: str) -> bool:
    """Whether a teacher's kept answers of this kind can train a recipe that now asks the teacher
    itself.
    """
    return not any(cache_contradictions(recipe, kind))


def _wrong_paths(recipe: "Recipe") -> Iterator[str]:
    """What no file can be called, before anything is looked for."""
    paths = {
        "[teacher] model": recipe.teacher.model,
        "[teacher] cache_folder": recipe.teacher.cache_folder,
        "[student] model": recipe.student.model,
        "[data] source": recipe.data.source,
        "[run] folder": recipe.run.folder,
        "[eval] task": recipe.eval.task.partition(":")[2],
    }
    named = [*paths.items(), *(("[eval] compare", name) for name in recipe.eval.compare)]
    for field, text in named:
        try:
            readers.path_of(text, field)
        except RecipeError as error:
            yield str(error)
    if wrong := wrong_name(recipe.run.name):
        yield wrong


def wrong_name(name: str) -> str:
    """Why a run cannot be called so; "" where it can."""
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return (
            f"[run] name {name[:60]!r} is not the plain name of a folder; run.folder says "
            "where it lies"
        )
    size = len(name.encode())
    if size > LONGEST_NAME:
        return f"[run] name has {size} bytes ({name[:20]}…), a run's can have {LONGEST_NAME}"
    return ""
