"""Arguments and options that several commands share, and how their values are checked.

In: what a person typed. Out: a value in range, or one line that says which range. Decided here: the
words, which are those of a recipe's fields.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.errors import DistillError
from mlx_distill.recipe.values import Range


def in_range(low: int, high: int) -> Callable:
    """A check of a whole number's option, in the words that a recipe's fields have."""
    allowed = Range(low, high)

    def checked(option: typer.CallbackParam, value: int) -> int:
        if not low <= value <= high:
            raise DistillError(f"{option.opts[0]} should be {allowed}, found {value}")
        return value

    return checked


def known_backend(name: str) -> str:
    if name != "auto":
        from mlx_distill.backends import refuse_unknown

        refuse_unknown(name)
    return name


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe's file, or a name: cot50 needs no file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.FIELD=VALUE", help="Override one field; may be repeated."),
]
ModelOrRunArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_RUN",
        help="A model (folder, hub id, .gguf, embedded:NAME) or a run folder.",
    ),
]
BackendOption = Annotated[
    str, typer.Option("--backend", callback=known_backend, help="auto, mlx or torch.")
]
