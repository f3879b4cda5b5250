"""What `run` does by itself, made before it for any number of runs: `teach`, `write`, `prune`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.commands.base import app, read, stoppable
from mlx_distill.terminal.options import BackendOption, SetOption


@app.command()
def teach(
    recipes: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE…", help="Recipes; those that share a cache share one pass."),
    ],
    set_: SetOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Ask the teacher once: write or complete the cache that teacher.cache names, for any number of
    runs.
    """
    from mlx_distill import stages

    with stoppable() as view:
        stages.teach([read(recipe, set_) for recipe in recipes], view, backend)


@app.command()
def write(
    recipes: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE…", help="Recipes; those that ask the same share texts."),
    ],
    set_: SetOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Let a model write once: write or complete the texts that rollouts.by asks for, for any number
    of runs.
    """
    from mlx_distill import stages

    with stoppable() as view:
        stages.write([read(recipe, set_) for recipe in recipes], view, backend)


@app.command()
def prune(
    recipes: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE…", help="Recipes; those that cut the same share a folder."),
    ],
    set_: SetOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Make the model that a student begins as: its base with fewer layers, MLP channels or heads,
    as the recipe's prune table says.
    """
    from mlx_distill import stages

    with stoppable() as view:
        stages.prune([read(recipe, set_) for recipe in recipes], view, backend)
