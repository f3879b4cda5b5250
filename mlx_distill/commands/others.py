"""What there is to see: `report`, `datasets`, `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.commands.base import app, console, stoppable
from mlx_distill.terminal.options import BackendOption


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
    with stoppable() as view:
        view.say(f"report: {write_report(runs, folder)}")


@app.command()
def datasets() -> None:
    """List the public datasets that data.source can name: hub id, format, rows, size, licence."""
    from mlx_distill.terminal.datasets import print_datasets

    print_datasets(console)


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
