"""From rows to a student: `init`, `show`, `plan`, `run`, `sweep`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.commands.base import app, console, keep_torch_out, read, stoppable
from mlx_distill.errors import DistillError, RecipeError
from mlx_distill.terminal.options import BackendOption, RecipeArgument, SetOption, in_range


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where recipe.toml is written.")
    ] = Path("."),
    teacher: Annotated[
        str, typer.Option("--teacher", help="A hub id, a folder, a .gguf, or embedded:teacher.")
    ] = "",
    student: Annotated[
        str, typer.Option("--student", help="The same; it has the teacher's vocabulary.")
    ] = "",
    data: Annotated[
        str,
        typer.Option("--data", help="Your rows: a file, a hub dataset, or embedded:dial."),
    ] = "",
) -> None:
    """Write a first recipe: looks at your rows, says what they hold, asks for what you do not name."""
    from mlx_distill.terminal.init import init as write_recipe

    asked = {"data": data, "teacher": teacher, "student": student}
    for name, value in asked.items():
        asked[name] = value or _ask(name)
    with stoppable() as view:
        write_recipe(folder, asked["teacher"], asked["student"], asked["data"], view.say)


def _ask(name: str) -> str:
    """What a person types at the terminal; where there is none, the option has to be given."""
    if not sys.stdin or not sys.stdin.isatty():
        raise DistillError(f"init: --{name} is missing, and there is no terminal to ask at")
    return str(typer.prompt(f"{name} (mlx-distill init --help says what can stand here)"))


@app.command()
def show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    example: Annotated[
        int,
        typer.Option(
            "--example", callback=in_range(1, 10**9), help="Which training example, from 1."
        ),
    ] = 1,
) -> None:
    """Print an example coloured by segment, what is cut and what is supervised, and token counts.
    Needs no weights.
    """
    keep_torch_out()
    from mlx_distill.terminal.show import show as print_example

    print_example(read(recipe, set_), console, example)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    backend: BackendOption = "auto",
    time: Annotated[
        bool,
        typer.Option("--time", help="Measure this machine's rate and estimate the training time."),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure the memory of one step, in a process of its own."),
    ] = False,
    machine: Annotated[
        str,
        typer.Option("--for", metavar="NAME", help="Another machine: h100-80gb, m4-max-64gb, …"),
    ] = "",
) -> None:
    """Say what a run will cost before it starts: tokens, FLOPs, memory by part, disk, and whether
    it fits. Needs no weights without --probe.
    """
    if not time:
        keep_torch_out()
    from mlx_distill.terminal.plan import plan as print_plan
    from mlx_distill.terminal.plan import plan_elsewhere

    if machine:
        if time or probe or backend != "auto":
            raise RecipeError(
                f"--for {machine} plans elsewhere: leave out --time, --probe, --backend"
            )
        plan_elsewhere(read(recipe, set_), console, machine)
    else:
        print_plan(read(recipe, set_), console, backend, time, probe)


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

    loaded = read(recipe, set_)
    with stoppable() as view:
        try:
            pipeline.run(loaded, view, backend, fresh, force)
        except Interrupted as stop:
            view.say(f"stopped; {stop}. The same command continues.")
            raise typer.Exit(130) from None


@app.command()
def sweep(
    sweeps: Annotated[
        list[Path],
        typer.Argument(
            metavar="SWEEP…", help="Sweep files, or names: fraction, position, segments."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Another base; its results lie in a folder of its name."),
    ] = None,
    set_: SetOption = None,
    backend: BackendOption = "auto",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", callback=in_range(1, 1024), help="Runs side by side, as far as memory allows."
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
    keep_torch_out()
    from mlx_distill.sweeps.outline import outline
    from mlx_distill.sweeps.queue import run_sweeps
    from mlx_distill.sweeps.sweep import load_sweep

    loaded = [load_sweep(path, tuple(set_ or ()), recipe) for path in sweeps]
    if dry_run:
        outline(loaded, console, backend)
        return
    with stoppable() as view:
        run_sweeps(loaded, view, backend, jobs)
