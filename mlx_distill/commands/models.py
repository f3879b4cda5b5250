"""A finished student, or any model: `eval`, `compare`, `chat`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.commands.base import app, console, stoppable
from mlx_distill.errors import DistillError
from mlx_distill.terminal.options import BackendOption, ModelOrRunArgument, in_range
from mlx_distill.view import View


@app.command("eval")
def evaluate(
    model: ModelOrRunArgument,
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
        with stoppable() as view:
            score_model(model, task, settings, view, backend, out)
        return
    run = run_at(model)
    if run is None:
        raise DistillError(f"{model} is no run, whose recipe has a task: name one with --task")
    if out:
        raise DistillError("--out goes with --task: the scores of a run's own task lie in the run")
    weights_of(model)
    with stoppable() as view:
        pipeline.score(run, settings, view, backend)


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
    with stoppable() as view:
        found = []
        for name in (a, b):
            if task:
                score = score_model(name, task, tuple(set_ or ()), view, backend, out)
                found.append(Scored(name, score, (task, "", "")))
            else:
                found.append(scored_by(name))
        lines, page = compared(found[0], found[1], out)
        for line in lines:
            view.say(line)
        view.say(f"page: {page}")


@app.command()
def chat(
    model: ModelOrRunArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Ask this alone; without it, a conversation.")
    ] = None,
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
    if prompt is not None and not prompt.strip():
        raise DistillError("--prompt is empty: say what to ask, or leave it out to talk")
    with View(console) as view:
        talk(model, Sampling(max_new_tokens, temperature, seed=seed), prompt or "", view, backend)


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

    with stoppable() as view:
        write_export(run, to, view, out, push, measure, backend)
