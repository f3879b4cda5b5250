"""The sweeps of this folder: from run folders to kept rows to the tables of benchmarks/README.md.

    python benchmarks/real/rows.py keep      copy each sweep's results.csv here, with the costs below
    python benchmarks/real/rows.py write     the tables, README's too, and the figure of arms.toml

A sweep's `flops` are of the student's steps. `costs.csv` has what else a run cost: `teacher_flops`,
the teacher's pass over the tokens of these steps, which a cache spares all but the first arm, and
`writing_flops`, a model's writing of the texts. A table's FLOPs are the sum of all three.
`kinds.csv` has the right answers to each kind of problem, `written.csv` what the models wrote that
students learned from. `fresh.csv` has students of `arms.csv` on the 201 problems that no arm is
asked, scored once with `mlx-distill eval RUN --set task=…`; no command here makes it. No number is
typed in.
"""

import csv
import dataclasses
import json
import sys
import tomllib
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.findings import gap, share  # noqa: E402
from benchmarks.real.figure import draw  # noqa: E402
from benchmarks.tables import rewrite_section  # noqa: E402
from mlx_distill.machine import this_machine  # noqa: E402
from mlx_distill.recipe.recipe import with_values  # noqa: E402
from mlx_distill.reporting.kept_run import read_run  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.reporting.study import (  # noqa: E402
    DONE,
    Condition,
    Row,
    conditions,
    difference,
    gain_retention,
    read_rows,
    retention,
    rows_text,
)
from mlx_distill.terminal.plan import plan_of  # noqa: E402
from mlx_distill.words import DASH, amount, counted, duration, percent  # noqa: E402

SWEEPS = {  # → where its runs lie
    "first": "runs",
    "second": "second/runs",
    "arms": "students",
    "shares": "students",
    "rest": "students",
    "on-policy": "on-policy/runs",
    "other-students": "other-students/runs",
    "rest-before": "students",
    "on-policy-before": "on-policy/runs",
}
BEFORE = (
    "-before"  # rows of an earlier sitting, whose teacher was another: not mixed with a sweep's
)
WRITTEN = ("by", "texts", "finished", "judged", "right", "tokens", "seconds")
app = typer.Typer(add_completion=False)


@app.command()
def keep(source: Annotated[Path, typer.Argument(help="folder of the sweeps")] = Path("runs/real")):
    """Copy the rows of the sweeps that have begun; costs that are known are not computed again."""
    known, kinds, written = kept_costs(), kept_kinds(), kept_writing()
    for name, runs in SWEEPS.items():
        found = source / name / "results.csv"
        if not found.exists() or not conditions(read_rows(found)):
            continue
        rows = joined(HERE / f"{name}.csv", read_rows(found))
        (HERE / f"{name}.csv").write_text(rows_text(rows))
        done = [row for row in rows if row.role == "student" and row.status == DONE]
        for row in done:
            key = runs, row.run, row.commit
            if key not in known:
                known[key] = costs(source / runs / row.run)
            kinds |= {(*key, *one): count for one, count in by_kind(source / runs / row.run)}
            if told := writing(source / runs / row.run):
                written[key] = told
        typer.echo(f"{HERE / name}.csv: {len(done)} runs")
    save("costs", ("teacher_flops", "writing_flops"), known)
    save("kinds", ("kind", "right", "asked"), kinds)
    save("written", WRITTEN, written)


def save(name: str, columns: tuple[str, ...], rows: dict) -> None:
    """`{name}.csv`: keys, which begin with where runs lie, run and commit, and values."""
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["runs", "run", "commit", *columns])
        writer.writerows([*key, *values] for key, values in sorted(rows.items()))


def saved(name: str) -> list[dict[str, str]]:
    path = HERE / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def writing(folder: Path) -> tuple[str, ...]:
    """What a model wrote for a run: `WRITTEN`; () where none did, or the run is gone."""
    if not (folder / "manifest.json").exists():
        return ()
    told = read_run(folder).manifest.written
    return tuple(str(getattr(told, name)) for name in WRITTEN) if told else ()


def kept_writing() -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(where runs lie, run, commit) → `WRITTEN`."""
    return {
        (row["runs"], row["run"], row["commit"]): tuple(row[name] for name in WRITTEN)
        for row in saved("written")
    }


def by_kind(folder: Path) -> list[tuple[tuple[str], tuple[int, int]]]:
    """(kind,) → right answers of the student, and problems asked; nothing of a run that is gone."""
    if not (folder / "generations.jsonl").exists():
        return []
    problems = Path(read_run(folder).recipe.eval.task.removeprefix("jsonl:"))
    kind_of = {row["prompt"]: row["kind"] for row in lines(problems)}
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for row in lines(folder / "generations.jsonl"):
        if row["model"] == "student":
            asked[kind_of[row["prompt"]]] += 1
            right[kind_of[row["prompt"]]] += row["correct"]
    return [((kind,), (right[kind], asked[kind])) for kind in asked]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept_kinds() -> dict[tuple[str, str, str, str], tuple[int, int]]:
    """(where runs lie, run, commit, kind) → right answers, and problems asked."""
    return {
        (row["runs"], row["run"], row["commit"], row["kind"]): (
            int(row["right"]),
            int(row["asked"]),
        )
        for row in saved("kinds")
    }


def joined(path: Path, rows: list[Row]) -> list[Row]:
    """Rows, after those that are kept of other runs, which another machine made, with a teacher of
    its own by the same recipe; the base, which is one for all, as it was scored first.
    """
    again = {(row.role, row.label, row.run) for row in rows}
    kept = [row for row in (read_rows(path) if path.exists() else []) if row.status == DONE]
    kept = [
        row for row in kept if row.role == "base" or (row.role, row.label, row.run) not in again
    ]
    scored = any(row.role == "base" for row in kept)
    return [*kept, *(row for row in rows if row.role != "base" or not scored)]


def kept_costs() -> dict[tuple[str, str, str], tuple[float, float]]:
    """(where runs lie, run, commit) → FLOPs of the teacher's pass, and of writing."""
    return {
        (row["runs"], row["run"], row["commit"]): (
            float(row["teacher_flops"]),
            float(row["writing_flops"]),
        )
        for row in saved("costs")
    }


def costs(folder: Path) -> tuple[float, float]:
    """What a run cost beside its student's steps: the teacher's trunk over the tokens that were
    read and its head over those that carry loss, as a plan of the data's texts counts them; and
    writing. A live teacher's passes are among the steps' FLOPs.
    """
    run = read_run(folder)
    done, writing = run.manifest, run.manifest.written
    if run.recipe.objective.kd_weight == 0 or "teacher" in done.flops:
        return 0.0, writing.flops if writing else 0.0
    live = with_values(run.recipe, teacher={"cache": "off"}, rollouts={"by": "data"})
    alone = with_values(live, objective={"kd_weight": 0.0})
    both, student = (
        plan_of(recipe, this_machine("torch"), advised=False)[1] for recipe in (live, alone)
    )
    trunk = both.flops["teacher"] * done.tokens_read / both.work.tokens_read
    head = (both.flops["head"] - student.flops["head"]) * done.loss_tokens / both.work.loss_tokens
    return trunk + head, writing.flops if writing else 0.0


@app.command()
def write() -> None:
    """Rewrite the tables of the sweeps that have rows, and the figure of the first question."""
    begun = [name for name in SWEEPS if (HERE / f"{name}.csv").exists()]
    base = [one for name in begun for one in conditions(all_in(name), "base")]
    for name in begun:
        text = page(all_in(name), base[0] if base else None)
        rewrite_section(f"real-{name}", f"{text}{kinds_table(name)}")
    if "arms" in begun:
        rows = all_in("arms")
        teacher = conditions(rows, "teacher")
        above, before = (models[0] if models else None for models in (teacher, base))
        arms = [arm for arm in conditions(rows) if len(arm.rows) > 1]
        draw(arms, above, before, HERE / "arms.svg")
        rewrite_section("real", lead(arms), HERE.parents[1] / "README.md")


def lead(arms: list[Condition]) -> str:
    """README's table below the figure: what each arm solves and finishes, and for what."""
    full = arms[0]
    learned = f"learned from (up to {len(full.rows)} training seeds)"
    head = [learned, "right", "finished", "of the FLOPs"]
    rows = [
        [
            arm.name,
            percent(arm.accuracy.mean),
            percent(1 - arm.cost("unfinished")),
            f"{arm.cost('flops') / full.cost('flops'):.2f}",
        ]
        for arm in arms
    ]
    return table(head, rows, "lrrr").replace("\u00a0", " ")


def all_in(name: str) -> list[Row]:
    """A sweep's rows in the order of its arms, whose FLOPs are those of the teacher's pass and of
    writing, too.
    """
    known, sweep = kept_costs(), HERE / f"{name.removesuffix(BEFORE)}.toml"
    named = [arm["name"] for arm in tomllib.loads(sweep.read_text())["arms"]]
    place = {arm: number for number, arm in enumerate(named)}
    kept = sorted(read_rows(HERE / f"{name}.csv"), key=lambda row: place.get(row.label, -1))
    return [
        dataclasses.replace(row, flops=row.flops + sum(known[SWEEPS[name], row.run, row.commit]))
        if row.role == "student" and row.status == DONE
        else row
        for row in kept
    ]


def page(rows: list[Row], base: Condition | None) -> str:
    """What was run, and the table. The first arm is the one that the others are compared with."""
    arms = conditions(rows)
    full, one = arms[0], arms[0].rows[0]
    seeds = sorted({row.seed for arm in arms for row in arm.rows})
    commits = ", ".join(sorted({row.commit[:7] for arm in arms for row in arm.rows}))
    said = [
        f"{sum(len(arm.rows) for arm in arms)} runs, {'seeds' if seeds[1:] else 'seed'} "
        f"{', '.join(map(str, seeds))}, "
        f"{len(one.right)} held-out problems, greedy; torch on {devices(arms)}; commit {commits}."
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


def devices(arms: list[Condition]) -> str:
    """What the runs were made on, with their number where it is not one for all."""
    made = Counter(row.device for arm in arms for row in arm.rows)
    if len(made) == 1:
        return next(iter(made))
    return " and ".join(f"{device} ({counted(count, 'run')})" for device, count in made.items())


def training(arm: Condition, full: Condition) -> str:
    """How long it took on the device of the whole arm's first run: times elsewhere compare nothing."""
    seconds = [row.train_seconds for row in arm.rows if row.device == full.rows[0].device]
    return duration(fmean(seconds)) if seconds else DASH


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
            training(arm, full),
        ]
        for arm in arms
    ]
    return table(head, rows, "l" + "r" * (len(head) - 1)).replace("\u00a0", " ")


def kinds_table(name: str) -> str:
    """Right answers to each kind of problem, over all seeds of an arm; "" where they are not kept."""
    kinds, arms = kept_kinds(), conditions(all_in(name))
    known = sorted({key[3] for key in kinds if key[0] == SWEEPS[name]})
    rows = []
    for arm in arms:
        counts = [
            [kinds.get((SWEEPS[name], row.run, row.commit, kind)) for row in arm.rows]
            for kind in known
        ]
        if not all(map(all, counts)):
            continue
        shares = [sum(right for right, _ in one) / sum(asked for _, asked in one) for one in counts]
        rows.append([arm.name, *map(percent, shares)])
    head = ["right, by kind", *known]
    text = table(head, rows, "l" + "r" * len(known)) if rows and known else ""
    return f"\n\n{text}".replace("\u00a0", " ") if text else ""


def _gap(arm: Condition, full: Condition) -> str:
    found = difference(arm, full)
    return gap(found) if found else DASH


if __name__ == "__main__":
    app()
