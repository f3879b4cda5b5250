"""What every command stands on: the application, its console, how a recipe is read and work is
stopped.

How a command ends, with an error or without one, is decided in `terminal/ending.py`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from mlx_distill import __version__
from mlx_distill.awake import kept_awake
from mlx_distill.data.detection import about_format, with_format
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.signals import ended_by_signals
from mlx_distill.terminal.ending import say_last
from mlx_distill.view import Screen, View


class _Commands(TyperGroup):
    def invoke(self, context: Any) -> Any:
        """Ctrl-C in a command that says nothing of it itself."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            say_last("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil reasoning models on a Mac: a recipe in, a smaller model that opens in mlx-lm and "
    "transformers out.",
)
console = Screen()


def read(path: Path, settings: list[str] | None) -> Recipe:
    """A recipe with the format of its rows, which is said where it was found."""
    asked = load_recipe(path, tuple(settings or ()))
    recipe = with_format(asked)
    note = about_format(asked.data, recipe.data)
    if note and (os.environ.get("RANK") or os.environ.get("MLX_RANK") or "0") == "0":
        console.print(Text(note), soft_wrap=True)
    return recipe


def keep_torch_out() -> None:
    """Before a command that computes nothing in this process: transformers takes torch for not
    installed, whose import costs 2 CPU seconds and 230 MB.
    """
    if sys.modules.keys() & {"torch", "transformers"}:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import transformers  # noqa: F401  which looks for torch once, here
    finally:
        del sys.modules["torch"]


@contextmanager
def stoppable() -> Iterator[View]:
    """A view to work in, while a Mac stays awake; Ctrl-C, or a polite kill, ends the work with a
    line and exit code 130.
    """
    if callable(
        signal.getsignal(signal.SIGINT)
    ):  # it may be ignored; else files will now be written that are to be left whole
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with View(console) as view:
        try:
            with ended_by_signals(), kept_awake():
                yield view
        except KeyboardInterrupt:
            view.say("stopped. The same command continues from what was saved last.")
            raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
