"""The command line: each command reads its arguments, calls one function and prints.

Decided here: how a command ends. A `DistillError`, a wrong option, a refusal of the operating
system and Ctrl-C are one line on stderr and an exit code (2, 2, 2, 130); a bug keeps its traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from mlx_distill import __version__
from mlx_distill.errors import DistillError
from mlx_distill.recipe import Range, load_recipe
from mlx_distill.signals import ended_by_signals
from mlx_distill.view import Screen, View, one_line, show_what_can_be_shown

LONGEST_LINE = 2000  # characters of an error
(UsageError,) = (
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)  # typer brings click under two names
# what the operating system refuses whatever a program does; a file that is missing is not among
# them
REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ESTALE,
}


class _Commands(TyperGroup):
    def invoke(self, context):
        """Ctrl-C in a command that says nothing of it itself."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            _say_last("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil reasoning models on a Mac: a recipe in, a smaller model that opens in mlx-lm and "
    "transformers out.",
)
console = Screen()


def _range(low: int, high: int) -> Callable:
    """A check of a whole number's option, in the words that a recipe's fields have."""
    allowed = Range(low, high)

    def checked(option: typer.CallbackParam, value: int) -> int:
        if not low <= value <= high:
            raise DistillError(f"--{option.name} should be {allowed}, found {value}")
        return value

    return checked


def _known_backend(name: str) -> str:
    if name != "auto":
        from mlx_distill.backends import refuse_unknown

        refuse_unknown(name)
    return name


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, for example recipes/cot50.toml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.FIELD=VALUE", help="Override one field; may be repeated."),
]
BackendOption = Annotated[
    str, typer.Option("--backend", callback=_known_backend, help="auto, mlx or torch.")
]


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    backend: BackendOption = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the run of this name and start over.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run even if the plan says that it does not fit.")
    ] = False,
) -> None:
    """Distil: train, export, score, report. On an unfinished run folder, continue where it stopped."""
    from mlx_distill import pipeline
    from mlx_distill.training.loop import Interrupted

    loaded = load_recipe(recipe, tuple(set_ or ()))
    with _stoppable() as view:
        try:
            pipeline.run(loaded, view, backend, fresh, force)
        except Interrupted as stop:
            view.say(f"stopped; {stop}. The same command continues.")
            raise typer.Exit(130) from None


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    backend: BackendOption = "auto",
    time: Annotated[
        bool,
        typer.Option("--time", help="Measure this machine's rate and estimate the training time."),
    ] = False,
) -> None:
    """Say what a run will cost before it starts: tokens, FLOPs, memory by part, disk, and whether
    it fits. Needs no weights.
    """
    from mlx_distill.terminal.plan import plan as print_plan

    print_plan(load_recipe(recipe, tuple(set_ or ())), console, backend, time)


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
    from mlx_distill import pipeline

    with _stoppable() as view:
        pipeline.teach(
            [load_recipe(recipe, tuple(set_ or ())) for recipe in recipes], view, backend
        )


@app.command()
def sweep(
    sweeps: Annotated[
        list[Path],
        typer.Argument(
            metavar="SWEEP…", help="Sweep files, for example recipes/sweeps/fraction.toml."
        ),
    ],
    set_: SetOption = None,
    backend: BackendOption = "auto",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", callback=_range(1, 1024), help="Runs side by side, as far as memory allows."
        ),
    ] = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say which runs there are and what each will cost, and run none."
        ),
    ] = False,
) -> None:
    """Run a base recipe along axes and seeds with one teacher pass: one table, one page, the best
    recipe for each budget.
    """
    from mlx_distill.sweeps.outline import outline
    from mlx_distill.sweeps.queue import run_sweeps
    from mlx_distill.sweeps.sweep import load_sweep

    loaded = [load_sweep(path, tuple(set_ or ())) for path in sweeps]
    if dry_run:
        outline(loaded, console, backend)
        return
    with _stoppable() as view:
        run_sweeps(loaded, view, backend, jobs)


@app.command()
def show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    example: Annotated[
        int,
        typer.Option(
            "--example", callback=_range(1, 10**9), help="Which training example, from 1."
        ),
    ] = 1,
) -> None:
    """Print an example coloured by segment, what is cut and what is supervised, and token counts.
    Needs no weights.
    """
    from mlx_distill.terminal.show import show as print_example

    print_example(load_recipe(recipe, tuple(set_ or ())), console, example)


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A model (folder, hub id, .gguf, embedded:NAME) or a run folder.",
        ),
    ],
    task: Annotated[str, typer.Option("--task", help="embedded:NAME, gsm8k:PATH or jsonl:PATH.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="A field of the eval table: examples=100."
        ),
    ] = None,
    backend: BackendOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for what is kept; default: evals in the run, or here."),
    ] = None,
) -> None:
    """Score a model on a task: accuracy with its 95 % interval, unfinished share, tokens. Started
    again, it goes on.
    """
    from mlx_distill import pipeline

    with _stoppable() as view:
        pipeline.score_model(model, task, tuple(set_ or ()), view, backend, out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the report; default: the run's own, or `reports`."),
    ] = None,
) -> None:
    """Write a Markdown table and one self-contained HTML page about one or several runs."""
    from mlx_distill.reporting.runs_page import report as write_report

    folder = out or (runs[0] if len(runs) == 1 else Path("reports"))
    with _stoppable() as view:
        view.say(f"report: {write_report(runs, folder)}")


@app.command()
def doctor(
    backend: BackendOption = "auto",
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Compare MLX's logits of this model with transformers' instead."
        ),
    ] = "",
) -> None:
    """A self-check to share: versions, device, BLAS, memory, a tiny loss against float64, a
    measured matmul rate.
    """
    from mlx_distill.terminal.doctor import check, check_model

    if not (check_model(console, model) if model else check(console, backend)):
        raise typer.Exit(1)


@contextmanager
def _stoppable() -> Iterator[View]:
    """A view to work in; Ctrl-C, or a polite kill, ends the work with a line and exit code 130."""
    if callable(
        signal.getsignal(signal.SIGINT)
    ):  # it may be ignored; else files will now be written that are to be left whole
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with View(console) as view:
        try:
            with ended_by_signals():
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


def main() -> None:
    """The `mlx-distill` command, in a process that ends with it."""
    show_what_can_be_shown()
    try:
        _refuse_deleted_folder()
        code = app(standalone_mode=False) or 0
        if sys.stdout:  # which a shell can close
            sys.stdout.flush()
    except DistillError as error:
        code = _say_error(str(error))
    except UsageError as error:
        code = _say_usage(error)
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        code = 1
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        code = _say_refusal(error)
    except SystemExit as ending:
        code = ending.code
    _end(code)


def _refuse_deleted_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        what = f"the working folder cannot be used ({error.strerror})"
        raise DistillError(f"{what}: it was deleted or moved; change to another one") from None


def _say_error(text: str) -> int:
    rank = os.environ.get("RANK") or os.environ.get("MLX_RANK") or "0"
    line = one_line(text)
    _say_last(
        f"error{f' (rank {rank})' if rank != '0' else ''}: "
        f"{line if len(line) <= LONGEST_LINE else f'{line[:LONGEST_LINE]}…'}"
    )
    return 2


def _say_usage(error: Exception) -> int:
    """A wrong option or argument; without any, the help is what was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    text = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx else "mlx-distill"
    return _say_error(f"{text}; `{command} --help` says what there is")


def _say_refusal(error: OSError) -> int:
    """What the operating system said, and of what: of a file, or of the place to which we print."""
    if error.filename is not None:
        return _say_error(f"{os.fsdecode(error.filename)}: {error.strerror}")
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        _drop_output()
        return _say_error(f"the output cannot be written: {error.strerror}")
    return _say_error(error.strerror)


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, so that the interpreter does not fail on it at
    its end.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_last(line: str) -> None:
    """The line that a command ends with; where even stderr takes nothing, the exit code has to do."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _end(code: int) -> NoReturn:
    """End the process; one of several ranks at once, without taking the interpreter down.

    A thread of torch's group that lets go of a tensor meanwhile would abort it (pytorch issue
    190489).
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # told already, or nowhere to tell it
            _drop_output()
            code = code or 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
