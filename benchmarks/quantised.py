"""What rounding costs a student that knew of it and one that did not: exports of the runs of
quantised.toml → kept rows → the table of benchmarks/README.md.

    mlx-distill sweep benchmarks/quantised.toml
    python benchmarks/quantised.py export runs/quantised    export each run to 4 bits, keep its rows
    python benchmarks/quantised.py write                    the table from the kept rows
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.tables import RESULTS, read_rows, rewrite_section  # noqa: E402
from mlx_distill.reporting import study  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.words import percent, points  # noqa: E402

NAME, TO = "quantised", "mlx-4bit"
FIELDS = ("arm", "seed", "commit", "accuracy", "rounded", "kl", "agreement")
app = typer.Typer(add_completion=False)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder.")] = Path("runs/quantised"),
) -> None:
    """Export each finished run, and keep what its export.json says."""
    rows = []
    for row in study.read_rows(folder / "results.csv"):
        if row.role != "student" or row.status != study.DONE:
            continue
        run = folder / "runs" / row.run
        kept = run / "exports" / TO / "export.json"
        if not kept.exists():
            subprocess.run(
                [sys.executable, "-m", "mlx_distill", "export", str(run), "--to", TO], check=True
            )
        told = json.loads(kept.read_text())["fidelity"]
        found = told["accuracy"], told["kl"], told["agreement"]
        rows.append([row.label, row.seed, row.commit, row.accuracy, *found])
    with (RESULTS / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(rows)


@app.command()
def write() -> None:
    """The table: a row a run, and the mean over seeds."""
    rows = read_rows(NAME)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    head = [
        "arm",
        "seed",
        "right, unrounded",
        "right, 4 bits",
        "difference",
        "KL",
        "same first choice",
    ]
    lines = []
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        lines += [[arm, row["seed"], *_cells([row])] for row in mine]
        lines.append([arm, "mean", *_cells(mine)])
    said = f"{len(rows)} runs; commit {', '.join(sorted({row['commit'] for row in rows}))}."
    if gap := _between(rows, arms):
        said += f" {gap}"
    body = table(head, lines, "lrrrrrr").replace("\u00a0", " ")
    rewrite_section(NAME, f"{said}\n\n{body}")


def _between(rows: list[dict[str, str]], arms: list[str]) -> str:
    """The difference of the two arms once rounded, paired by seed."""
    by_arm = [
        {row["seed"]: float(row["rounded"]) for row in rows if row["arm"] == arm} for arm in arms
    ]
    shared = [seed for seed in by_arm[0] if seed in by_arm[-1]]
    if len(shared) < 2:
        return ""
    gaps = [by_arm[-1][seed] - by_arm[0][seed] for seed in shared]
    low, high = ttest_1samp(gaps, 0).confidence_interval()
    return (
        f"At four bits, {arms[-1]} less {arms[0]}: {points(fmean(gaps))} points "
        f"({points(low)} to {points(high)}, Student's t over {len(shared)} seeds)."
    )


def _cells(rows: list[dict[str, str]]) -> list[str]:
    def mean(key: str) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    return [
        percent(mean("accuracy")),
        percent(mean("rounded")),
        f"{points(mean('rounded') - mean('accuracy'))} points",
        f"{mean('kl'):.4f}",
        percent(mean("agreement")),
    ]


if __name__ == "__main__":
    app()
