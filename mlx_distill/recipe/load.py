"""From a file and `--set table.field=value` overrides to a recipe.

In: a TOML file and overrides. Out: a frozen `Recipe`, named after its file where it does not name
itself. Decided here: unknown tables and fields are refused with the nearest known name, and every
fault is one line that starts with the file.
"""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_distill import readers
from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.files import of_people
from mlx_distill.recipe.complaints import describe, found_as, near, short
from mlx_distill.recipe.contradictions import wrong_name
from mlx_distill.recipe.read_when import is_read
from mlx_distill.recipe.recipe import CAME_LATER, TABLES, Recipe, with_values
from mlx_distill.recipe.shipped import named, where_recipes_are
from mlx_distill.recipe.training_tables import EvalTable

# what a recipe must name, for a table that is read without it
UNNAMED = {
    "student": {"model": "none"},
    "data": {"source": "none"},
    "objective": {"kd_weight": 0.0},
}


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe and apply `table.field=value` overrides through the same checks. A name
    that no file has ("cot50") may be one of the recipes that come with the program.

    Raises `NotFound` (no such file) or `RecipeError` (file, table, field, what was found and the
    choices), one line each.
    """
    path = named(path)
    tables = read_toml(path)
    refuse_sweep(tables, path)
    for override in overrides:
        apply_override(tables, override)
    return build_recipe(tables, path)


def refuse_sweep(tables: dict[str, Any], path: Path) -> None:
    """Raise `RecipeError` for a sweep's file where a recipe is asked for."""
    if isinstance(tables.get("recipe"), str) or "axes" in tables or "arms" in tables:
        raise RecipeError(
            f"{path} is a sweep, which runs a recipe many times: `mlx-distill sweep {path}` runs it"
        )


def load_kept_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a run keeps: where one of an earlier version lacks a field, it says what that
    version did. `overrides` as for `load_recipe`, and it raises as that does.
    """
    tables = read_toml(path)
    for override in overrides:
        apply_override(tables, override)
    recipe = build_recipe(tables, path)
    for (table, field), mark in CAME_LATER.items():
        if field not in tables.get(table, {}) and is_read(recipe, f"{table}.{field}"):
            recipe = with_values(recipe, **{table: {field: mark.value}})
    return recipe


def build_recipe(tables: dict[str, Any], path: Path) -> Recipe:
    """The recipe of these tables; `path` is where they come from, for errors and for a run's name.
    Raises `RecipeError`.
    """
    refuse_unknown(tables, path)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None
    if not recipe.run.name:
        if wrong := wrong_name(path.stem):
            raise RecipeError(f"{path}: {wrong}: set run.name, which is else the file's")
        recipe = with_values(recipe, run={"name": path.stem})
    return recipe


def read_toml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """A file's content; raises `NotFound` with the nearest name there is, or `RecipeError`."""
    try:
        return readers.read_toml(path)
    except NotFound:
        there = [file.name for file in of_people(path.parent, "*.toml")]
        nearest = difflib.get_close_matches(path.name, there, 1)
    advice = where_recipes_are(path, what == "sweep")
    hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else f"; {advice}"
    raise NotFound(f"no {what} at {path}{', which is a folder' if path.is_dir() else ''}{hint}")


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Set what `table.field=value` says, the value read as TOML, or as a bare word; raises
    `RecipeError`.
    """
    name, equals, text = override.partition("=")
    table, dot, field = name.strip().partition(".")
    if not (equals and dot and field):
        raise RecipeError(
            f"--set {short(override)}: expected table.field=value, for example --set "
            "truncation.fraction=0.25"
        )
    if not isinstance(tables.setdefault(table, {}), dict):
        raise RecipeError(f"--set {short(override)}: {table} is not a table of the recipe")
    tables[table][field.strip()] = readers.toml_value(text, f"--set {short(name.strip())}")


def refuse_unknown(tables: dict[str, Any], path: Path) -> None:
    """Raise `RecipeError` for a table or field that no recipe has, with the nearest one that it
    has.
    """
    for table, fields in tables.items():
        if table not in TABLES:
            raise RecipeError(f"{path}: no table [{short(table)}] in a recipe{near(table, TABLES)}")
        if not isinstance(fields, dict):
            raise RecipeError(f"{path}: [{table}] must be a table, found {found_as(fields)}")
        known = TABLES[table].model_fields
        for field in fields:
            if field not in known:
                raise RecipeError(
                    f"{path}: [{table}] has no field {found_as(field)}{near(field, known)}"
                )
            if not readers.is_text(fields[field]):
                raise RecipeError(
                    f"{path}: [{table}] {field} is not text in UTF-8, found "
                    f"{found_as(fields[field])}"
                )


def eval_table(settings: tuple[str, ...]) -> EvalTable:
    """The `[eval]` table with `field=value` settings, checked as in a recipe."""
    tables: dict = {}
    for setting in settings:
        apply_override(tables, f"eval.{setting}")
    refuse_unknown(tables, Path("--set"))
    try:
        return Recipe.model_validate(tables | UNNAMED).eval
    except ValidationError as error:
        raise RecipeError(f"--set: {describe(error)}") from None
