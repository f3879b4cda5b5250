"""A run's recipe on its page: what it changes first, all of it behind a fold, and as TOML to copy.

In: a `Run`. Out: blocks. Decided here: a field counts as changed where it differs from what a recipe
that does not set it would say.
"""

import json
from typing import Any

import tomli_w

from mlx_distill.recipe.defaults import FOLLOWS
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.reporting.kept_run import Run
from mlx_distill.reporting.page import Block, Copied, Fields, Fold, Note


def recipe_blocks(run: Run) -> list[Block]:
    """Nothing where the recipe is not known."""
    if run.recipe is None:
        return []
    changed = changes(run.recipe)
    said: list[Block] = [Fields(_shown(changed, changed))] if changed else []
    if not changed:
        said.append(Note("Every field is as it is by default."))
    everything = run.recipe.model_dump(mode="json")
    fields = Fields(_shown(everything, changed))
    return [
        *said,
        Fold("Copy as TOML", "a recipe of these fields alone", [], [], [Copied(toml(run.recipe))]),
        Fold("All fields", "in bold where they differ from the default", [], [], [fields]),
    ]


def changes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Table → field → value, of the fields that differ from their defaults."""
    ours, theirs = (one.model_dump(mode="json") for one in (recipe, Recipe.model_construct()))
    for path, rule in FOLLOWS.items():
        table, field = path.split(".")
        theirs[table][field] = rule.value(recipe)
    found = {
        table: {name: value for name, value in fields.items() if value != theirs[table][name]}
        for table, fields in ours.items()
    }
    return {table: fields for table, fields in found.items() if fields}


def toml(recipe: Recipe) -> str:
    """The changed fields as a recipe: reading it gives an equal one."""
    return tomli_w.dumps(changes(recipe))


def _shown(
    tables: dict[str, dict[str, Any]], changed: dict[str, dict[str, Any]]
) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    return [
        (
            table,
            [
                (name, json.dumps(value, ensure_ascii=False), name in changed.get(table, {}))
                for name, value in fields.items()
            ],
        )
        for table, fields in tables.items()
    ]
