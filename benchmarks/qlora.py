"""What four bits in the base cost a student that learns by LoRA: kept rows of qlora.toml → the table
of benchmarks/README.md.

    mlx-distill sweep benchmarks/qlora.toml
    python benchmarks/qlora.py keep runs/qlora    copy the sweep's rows to results/
    python benchmarks/qlora.py write              the table from the kept rows
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.findings import gap, share  # noqa: E402
from benchmarks.tables import RESULTS, rewrite_section  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.reporting.study import Row, conditions, difference, read_rows  # noqa: E402
from mlx_distill.words import percent  # noqa: E402

NAME = "qlora"
app = typer.Typer(add_completion=False)


@app.command()
def keep(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder.")] = Path("runs/qlora"),
) -> None:
    """Copy the sweep's rows."""
    shutil.copy(folder / "results.csv", RESULTS / f"{NAME}.csv")


@app.command()
def write() -> None:
    """The table: a row a run and one for the mean of each arm, and the arms' difference."""
    arms = conditions(read_rows(RESULTS / f"{NAME}.csv"))
    lines: list[list[str]] = []
    for arm in arms:
        lines += [[arm.label, str(row.seed), *_cells(row)] for row in arm.rows]
        mean = [share(arm.accuracy), percent(1 - arm.cost("unfinished")), f"{arm.cost('kl'):.4f}"]
        lines.append([arm.label, "mean", *mean])
    first, last = arms[0], arms[-1]
    one = first.rows[0]
    said = (
        f"{sum(len(arm.rows) for arm in arms)} runs, {len(one.right)} held-out problems; "
        f"{one.backend} on {one.device}; commit {one.commit}."
    )
    if found := difference(last, first):
        said += f" {last.label} less {first.label}: {gap(found)}."
    head = ["arm", "seed", "right", "finished", "KL to the teacher"]
    body = table(head, lines, "lrrrr").replace("\u00a0", " ")
    rewrite_section(NAME, f"{said}\n\n{body}")


def _cells(row: Row) -> list[str]:
    return [percent(row.accuracy), percent(1 - row.unfinished), f"{row.kl:.4f}"]


if __name__ == "__main__":
    app()
