"""Sweeps whose arms are told by what they solve: kept rows → a table of benchmarks/README.md.

mlx-distill sweep benchmarks/NAME.toml
python benchmarks/arms.py keep NAME     copy the rows of runs/NAME to results/
python benchmarks/arms.py write NAME    the table from the kept rows
"""

import shutil
import sys
from pathlib import Path

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.findings import gap, share  # noqa: E402
from benchmarks.tables import RESULTS, rewrite_section  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.reporting.study import Condition, conditions, difference, read_rows  # noqa: E402
from mlx_distill.words import DASH, percent  # noqa: E402

app = typer.Typer(add_completion=False)


@app.command()
def keep(name: str) -> None:
    """Copy the sweep's rows."""
    shutil.copy(Path("runs") / name / "results.csv", RESULTS / f"{name}.csv")


@app.command()
def write(name: str) -> None:
    """The table: a row an arm, beside the first one."""
    arms = conditions(read_rows(RESULTS / f"{name}.csv"))
    one = arms[0].rows[0]
    said = (
        f"{sum(len(arm.rows) for arm in arms)} runs, {len(one.right)} held-out problems; "
        f"{one.backend} on {one.device}; commit {one.commit[:7]}."
    )
    head = ["arm", "right, by seed", "right", "against the first", "finished", "KL to the teacher"]
    body = table(head, [cells(arm, arms[0]) for arm in arms], "lrrrrr").replace("\u00a0", " ")
    rewrite_section(name, f"{said}\n\n{body}")


def cells(arm: Condition, first: Condition) -> list[str]:
    found = None if arm is first else difference(arm, first)
    return [
        arm.label,
        ", ".join(percent(row.accuracy) for row in arm.rows),
        share(arm.accuracy),
        gap(found) if found else DASH,
        percent(1 - arm.cost("unfinished")),
        f"{arm.cost('kl'):.4f}",
    ]


if __name__ == "__main__":
    app()
