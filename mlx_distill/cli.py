"""The command line: each command reads its arguments, calls one function and prints.

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
from mlx_distill.errors import DistillError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.signals import ended_by_signals
from mlx_distill.terminal.ending import run_to_its_end, say_last
from mlx_distill.terminal.options import BackendOption, RecipeArgument, SetOption, in_range
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
    with _stoppable() as view:
        write_recipe(folder, asked["teacher"], asked["student"], asked["data"], view.say)


def _ask(name: str) -> str:
    """What a person types at the terminal; where there is none, the option has to be given."""
    if not sys.stdin or not sys.stdin.isatty():
        raise DistillError(f"init: --{name} is missing, and there is no terminal to ask at")
    return str(typer.prompt(f"{name} (mlx-distill init --help says what can stand here)"))


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

    loaded = _read(recipe, set_)
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
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure the memory of one step, in a process of its own."),
    ] = False,
) -> None:
    """Say what a run will cost before it starts: tokens, FLOPs, memory by part, disk, and whether
    it fits. Needs no weights without --probe.
    """
    if not time:
        _keep_torch_out()
    from mlx_distill.terminal.plan import plan as print_plan

    print_plan(_read(recipe, set_), console, backend, time, probe)


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
        pipeline.teach([_read(recipe, set_) for recipe in recipes], view, backend)


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
    from mlx_distill import pipeline

    with _stoppable() as view:
        pipeline.write([_read(recipe, set_) for recipe in recipes], view, backend)


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
    from mlx_distill import pipeline

    with _stoppable() as view:
        pipeline.prune([_read(recipe, set_) for recipe in recipes], view, backend)


@app.command()
def sweep(
    sweeps: Annotated[
        list[Path],
        typer.Argument(
            metavar="SWEEP…", help="Sweep files, or names: fraction, position, segments."
        ),
    ],
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
    _keep_torch_out()
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
def datasets() -> None:
    """List the public datasets that data.source can name: hub id, format, rows, size, licence."""
    from mlx_distill.terminal.datasets import print_datasets

    print_datasets(console)


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
    _keep_torch_out()
    from mlx_distill.terminal.show import show as print_example

    print_example(_read(recipe, set_), console, example)


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A model (folder, hub id, .gguf, embedded:NAME) or a run folder.",
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="gsm8k, math500, aime24, aime25, aime26, amc23, olympiadbench (of the hub, or "
            "NAME:PATH), embedded:NAME, math:PATH or jsonl:PATH; "
            "default: the task of a run's own recipe, for its eval.json and report.",
        ),
    ] = "",
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
    from mlx_distill.runs.named import run_at, weights_of
    from mlx_distill.scoring.of_model import score_model

    settings = tuple(set_ or ())
    if task:
        with _stoppable() as view:
            score_model(model, task, settings, view, backend, out)
        return
    run = run_at(model)
    if run is None:
        raise DistillError(f"{model} is no run, whose recipe has a task: name one with --task")
    if out:
        raise DistillError("--out goes with --task: the scores of a run's own task lie in the run")
    weights_of(model)
    with _stoppable() as view:
        pipeline.score(run, settings, view, backend)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="hf, mlx, mlx-4bit, mlx-8bit, gguf, gguf-q8_0, gguf-q4_0, peft or mlx-adapters.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; default: exports/FORMAT in the run."),
    ] = None,
    push: Annotated[
        str, typer.Option("--push", metavar="ID", help="Upload it to org/name of the hub, too.")
    ] = "",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Of a quantised export: its KL and its accuracy against the student.",
        ),
    ] = True,
    backend: BackendOption = "auto",
) -> None:
    """Write the student of a run for another program, with a model card: transformers, mlx-lm, peft,
    llama.cpp, LM Studio, Ollama.
    """
    from mlx_distill.exporting.export import export as write_export

    with _stoppable() as view:
        write_export(run, to, view, out, push, measure, backend)


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A model (folder, hub id, .gguf, embedded:NAME) or a run folder.",
        ),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", help="Ask this alone; without it, a conversation.")
    ] = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", callback=in_range(1, 2**20), help="Where an answer is cut off."
        ),
    ] = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", help="At which answers are drawn; 0 = greedy.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", callback=in_range(0, 2**32 - 1), help="Draws the answers.")
    ] = 0,
    backend: BackendOption = "auto",
) -> None:
    """Talk to a model, or to the student of a run; what it thinks is dimmed."""
    from mlx_distill.backends.protocol import Sampling
    from mlx_distill.terminal.chat import chat as talk

    if not 0 <= temperature <= 100:
        raise DistillError(f"--temperature should be from 0 to 100, found {temperature}")
    with View(console) as view:
        talk(model, Sampling(max_new_tokens, temperature, seed=seed), prompt, view, backend)


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
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run, a kept result, or a model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    task: Annotated[
        str, typer.Option("--task", help="Score both on this task first, as far as needed.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="A field of the eval table, with --task."
        ),
    ] = None,
    backend: BackendOption = "auto",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the page and for what is scored.")
    ] = Path("compared"),
) -> None:
    """Say which of two runs or models is better on the problems that both were given, in a line and
    on a page.
    """
    from mlx_distill.reporting.compared import Scored, compared, scored_by
    from mlx_distill.scoring.of_model import score_model

    if set_ and not task:
        raise DistillError("--set goes with --task: kept scores are compared as they are")
    with _stoppable() as view:
        found = []
        for name in (a, b):
            if task:
                score = score_model(name, task, tuple(set_ or ()), view, backend, out)
                found.append(Scored(name, score, (task, "", "")))
            else:
                found.append(scored_by(name))
        line, page = compared(found[0], found[1], out)
        view.say(line)
        view.say(f"page: {page}")


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


def _read(path: Path, settings: list[str] | None) -> Recipe:
    """A recipe with the format of its rows, which is said where it was found."""
    asked = load_recipe(path, tuple(settings or ()))
    recipe = with_format(asked)
    note = about_format(asked.data, recipe.data)
    if note and (os.environ.get("RANK") or os.environ.get("MLX_RANK") or "0") == "0":
        console.print(Text(note), soft_wrap=True)
    return recipe


def _keep_torch_out() -> None:
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
def _stoppable() -> Iterator[View]:
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


def main() -> None:
    """The `mlx-distill` command, in a process that ends with it."""
    run_to_its_end(lambda: app(standalone_mode=False))
