"""The sweeps of this folder: from run folders to kept rows to the tables of benchmarks/README.md.

    python benchmarks/real/rows.py keep      copy each sweep's results.csv here, with the costs below
    python benchmarks/real/rows.py write     the tables from the kept rows

A sweep's `flops` are of the student's steps. Here two more columns stand beside them:
`teacher_flops`, what the teacher's pass over the tokens of these steps costs where no cache has its
answers already, and `writing_flops`, what a model's writing of the texts cost. A table's FLOPs are
the sum of all three. No number is typed in.
"""

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.findings import gap, share  # noqa: E402
from benchmarks.tables import rewrite_section  # noqa: E402
from mlx_distill.machine import this_machine  # noqa: E402
from mlx_distill.recipe.recipe import with_values  # noqa: E402
from mlx_distill.reporting.kept_run import read_run  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.reporting.study import (  # noqa: E402
    Condition,
    Row,
    conditions,
    difference,
    gain_retention,
    read_rows,
    retention,
)
from mlx_distill.terminal.plan import plan_of  # noqa: E402
from mlx_distill.words import DASH, amount, duration, percent  # noqa: E402

SWEEPS = {"arms": "runs", "rest": "runs", "on-policy": "on-policy/runs"}  # → where its runs lie
COSTS = ("teacher_flops", "writing_flops")
app = typer.Typer(add_completion=False)


@app.command()
def keep(source: Annotated[Path, typer.Argument(help="folder of the sweeps")] = Path("runs/real")):
    """Copy the rows of the sweeps that have begun; costs that are known are not computed again."""
    for name, runs in SWEEPS.items():
        found, kept = source / name / "results.csv", HERE / f"{name}.csv"
        if not found.exists():
            continue
        known = {row["run"]: row for row in read(kept)} if kept.exists() else {}
        rows = [row | costs(row, source / runs, known) for row in read(found)]
        with kept.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        typer.echo(f"{kept}: {len(rows)} rows")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def costs(row: dict[str, str], runs: Path, known: dict[str, dict[str, str]]) -> dict[str, float]:
    """What a run cost beside its student's steps."""
    if row["role"] != "student" or row["status"] != "done":
        return dict.fromkeys(COSTS, 0.0)
    if (old := known.get(row["run"])) and old["commit"] == row["commit"]:
        return {name: float(old[name]) for name in COSTS}
    run = read_run(runs / row["run"])
    live = with_values(run.recipe, teacher={"cache": "off"})
    plan = plan_of(live, this_machine("torch"), advised=False)[1]
    written = run.manifest.written
    return {
        "teacher_flops": plan.flops.get("teacher", 0.0),
        "writing_flops": written.flops if written else 0.0,
    }


@app.command()
def write() -> None:
    """Rewrite the tables of the sweeps that have rows."""
    base = conditions(all_in(HERE / "arms.csv"), "base")
    for name in SWEEPS:
        if (path := HERE / f"{name}.csv").exists():
            rewrite_section(f"real-{name}", page(all_in(path), base[0] if base else None))


def all_in(path: Path) -> list[Row]:
    """Kept rows, whose FLOPs are those of the teacher's pass and of writing, too."""
    beside = {row["run"]: sum(float(row[name]) for name in COSTS) for row in read(path)}
    return [
        dataclasses.replace(row, flops=row.flops + beside[row.run]) if row.flops else row
        for row in read_rows(path)
    ]


def page(rows: list[Row], base: Condition | None) -> str:
    """What was run, and the table. The first arm is the one that the others are compared with."""
    arms = conditions(rows)
    full, one = arms[0], arms[0].rows[0]
    seeds = sorted({row.seed for arm in arms for row in arm.rows})
    commits = ", ".join(sorted({row.commit[:7] for arm in arms for row in arm.rows}))
    said = [
        f"{sum(len(arm.rows) for arm in arms)} runs, seeds {', '.join(map(str, seeds))}, "
        f"{len(one.right)} held-out problems, greedy; torch on {one.device}; commit {commits}."
    ]
    models = [("before training", base)]
    models += [("teacher", found) for found in conditions(rows, "teacher")]
    said += [
        f"{name.capitalize()}: {share(model.accuracy)} right, "
        f"{percent(1 - model.cost('unfinished'))} finished."
        for name, model in models
        if model
    ]
    return " ".join(said) + "\n\n" + arms_table(arms, full, base)


def arms_table(arms: list[Condition], full: Condition, base: Condition | None) -> str:
    head = [
        "arm",
        "seeds",
        "right",
        f"against {full.name}",
        "of its right answers",
        "of its gain",
        "finished",
        "tokens an answer",
        "KL",
        "FLOPs",
        "of its FLOPs",
        "training",
    ]
    rows = [
        [
            arm.name,
            str(len(arm.rows)),
            share(arm.accuracy),
            DASH if arm is full else _gap(arm, full),
            DASH if arm is full else share(retention(arm, full)),
            DASH if arm is full or base is None else share(gain_retention(arm, full, base)),
            percent(1 - arm.cost("unfinished")),
            f"{arm.cost('mean_tokens'):.0f}",
            f"{arm.cost('kl'):.3f}",
            amount(arm.cost("flops"), "FLOP"),
            f"{arm.cost('flops') / full.cost('flops'):.2f}",
            duration(arm.cost("train_seconds")),
        ]
        for arm in arms
    ]
    return table(head, rows, "l" + "r" * (len(head) - 1)).replace("\u00a0", " ")


def _gap(arm: Condition, full: Condition) -> str:
    found = difference(arm, full)
    return gap(found) if found else DASH


if __name__ == "__main__":
    app()
