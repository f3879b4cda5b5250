"""A sweep file as it is written: a base recipe, and what is to change.

In: a TOML file. Out: a `SweepFile`. Decided here: which fields may be axes, and how tables become
settings ("truncation.fraction" → 0.5).
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlx_distill.errors import RecipeError
from mlx_distill.readers import path_of
from mlx_distill.recipe.complaints import describe, found_as, near, short
from mlx_distill.recipe.load import read_toml
from mlx_distill.recipe.recipe import TABLES
from mlx_distill.recipe.tables import Table
from mlx_distill.recipe.values import Fraction

Settings = dict[str, Any]  # "table.field" → value
Tables = Annotated[dict[str, Any], Field(default_factory=dict)]
NOT_AN_AXIS = {  # field → what to do instead
    "run.seed": "use seeds = […]",
    "run.name": "runs are named by what they change",
    "run.folder": 'use runs = "FOLDER"',
    "eval.score_base": "use [set]",
    "eval.score_teacher": "use [set]",
    "eval.compare": "the sweep's page compares all of its runs",
}


class SweepFile(Table):
    """A sweep as it is written; nested tables hold `table.field = value` as in a recipe."""

    # the base; a path from this file
    recipe: str = ""
    # what the sweep is to answer, for its page
    question: str = ""
    # of the results; "" = runs/NAME
    folder: str = ""
    # of the run folders, which several sweeps may share; "" = FOLDER/runs
    runs: str = ""
    # values of run.seed; () = the base's
    seeds: Annotated[tuple[int, ...], Field(strict=False)] = ()
    # fractions to run with 1/fraction times the examples
    token_matched: Annotated[tuple[Fraction, ...], Field(strict=False)] = ()
    # changes the base
    set: Tables
    # a list of values each; every combination is run
    axes: Tables
    # the condition that the others are compared with; {} = the dearest
    full: Tables
    # single conditions beside the axes, each with a name
    arms: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()


def results_folder(file: SweepFile, path: Path) -> Path:
    """Where the results of the sweep at `path` go."""
    return Path(file.folder or f"runs/{path.stem}").expanduser()


def over(file: SweepFile, path: Path, recipe: Path) -> SweepFile:
    """The sweep at `path` over another base recipe, whose name its folders get below their own: what
    was run over one base is not another's.
    """
    folder = results_folder(file, path) / recipe.stem
    runs = str(Path(file.runs) / recipe.stem) if file.runs else ""
    return file.model_copy(update={"folder": str(folder), "runs": runs})


def read_sweep_file(path: Path) -> SweepFile:
    """A sweep file's fields; raises `RecipeError` for what it cannot have."""
    content = read_toml(path, "sweep")
    if content.keys() & TABLES.keys() and not content.keys() & SweepFile.model_fields.keys():
        raise RecipeError(
            f"{path} is a recipe, not a sweep of one: `mlx-distill run {path}` runs it, and a sweep "
            "names it as its `recipe`"
        )
    for key in content:
        if key not in SweepFile.model_fields:
            raise RecipeError(
                f"{path}: a sweep has no {found_as(key)}{near(key, SweepFile.model_fields)}"
            )
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None
    if not file.recipe:
        raise RecipeError(
            f"{path}: recipe is empty: name the base recipe, by its path from this file"
        )
    for field in ("recipe", "folder", "runs"):
        path_of(getattr(file, field), f"{path}: {field}")
    return file


def flat(tables: dict[str, Any], path: Path, where: str) -> Settings:
    """{"truncation": {"fraction": 0.5}} → {"truncation.fraction": 0.5}."""
    for table, fields in tables.items():
        if not isinstance(fields, dict):
            example = "should be table.field, for example truncation.fraction"
            raise RecipeError(
                f"{path}: [{where}] {short(table)} {example}, found {found_as(fields)}"
            )
    return {
        f"{table}.{name}": value
        for table, fields in tables.items()
        for name, value in fields.items()
    }


def assign(tables: dict[str, Any], settings: Settings, path: Path) -> None:
    """Put settings into a recipe's tables."""
    for name, value in settings.items():
        table, _, key = name.partition(".")
        if not isinstance(tables.setdefault(table, {}), dict):
            raise RecipeError(
                f"{path}: [{short(table)}] must be a table, found {found_as(tables[table])}"
            )
        tables[table][key] = value


def refuse_no_axis(path: Path, name: str) -> None:
    """Raise `RecipeError` for a field by which runs are not compared."""
    if name in NOT_AN_AXIS:
        raise RecipeError(
            f"{path}: {name} does not make runs that can be compared: {NOT_AN_AXIS[name]}"
        )
