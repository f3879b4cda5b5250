"""Smaller and rounded students of a real language model: a minute's training each, three seeds.

    python benchmarks/methods.py run      every arm and seed that has no row yet (real/methods.toml)
    python benchmarks/methods.py write    the table from the kept rows

In: the fine-tuned SmolLM2 and the worked problems of "Students that finish". Out: a row a run as it
ends in results/methods.csv: how far the student is from its teacher on held-out texts, once as it
trained and, for two arms, once more after rounding to MLX's four bits.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import machines  # noqa: E402
from benchmarks.tables import RESULTS, append_rows, read_rows, rewrite_section  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.words import DASH  # noqa: E402

NAME = "methods"
SEEDS = (1, 2, 3)
FULL = ("student.tuning=full", "optim.learning_rate=1e-4")
CHANNELS = ("prune.channels=1024",)  # of 1,536
ARMS: dict[str, tuple[str, ...]] = {  # the first of a group is what its others are set beside
    "LoRA": (),
    "LoRA on four bits": ("student.quantize_bits=4",),
    "LoRA on NF4": ('student.quantize_bits="nf4"',),
    "all weights": FULL,
    "all weights, learned with four bits": (*FULL, "student.quantize_aware_bits=4"),
    "all weights, two thirds of the channels, before": (*FULL, *CHANNELS),
    "all weights, two thirds of the channels, in six rounds": (*FULL, *CHANNELS, "prune.rounds=6"),
    "all weights, 24 of 30 layers": (*FULL, "prune.layers=24", 'prune.layers_by="change"'),
}
CUT = "all weights, two thirds of the channels, before"
SHALLOW = "all weights, 24 of 30 layers"
ROUNDED = ("all weights", "all weights, learned with four bits")
app = typer.Typer(add_completion=False)


@app.command()
def run(
    runs: Annotated[Path, typer.Option(help="where the runs are made, and removed again")] = Path(
        "runs/methods"
    ),
    backend: str = "torch",
) -> None:
    """Train what has no row yet, seed by seed."""
    done = {(row["arm"], row["seed"]) for row in read_rows(NAME)} if kept().exists() else set()
    for seed in SEEDS:
        for arm, settings in ARMS.items():
            if (arm, str(seed)) not in done:
                append_rows(NAME, [measure(arm, settings, seed, runs, backend)])


def measure(
    arm: str, settings: tuple[str, ...], seed: int, runs: Path, backend: str
) -> dict[str, object]:
    folder = runs / f"{list(ARMS).index(arm)}-{seed}"
    distil(folder, backend, *settings, f"run.seed={seed}")
    first, *_, last = validations(folder)
    rounded = ""
    if arm in ROUNDED:  # before it learns: adapters on the student's four bits change nothing yet
        again = folder.with_name(f"{folder.name}-rounded")
        of = (f'student.model="{folder}/student"', "student.quantize_bits=4", "optim.steps=1")
        distil(again, backend, *of, f"run.seed={seed}")
        rounded = validations(again)[0]["kl_cot"]
        shutil.rmtree(again)
    shutil.rmtree(folder)
    return {
        **machines.facts("mlx_distill"),
        "backend": backend,
        "arm": arm,
        "seed": seed,
        "settings": " ".join(settings),
        "kl_before": first["kl_cot"],
        "kl": last["kl_cot"],
        "ce": last["ce_cot"],
        "agree": last["agree_cot"],
        "rounded_kl": rounded,
    }


def distil(folder: Path, backend: str, *settings: str) -> None:
    asked = (*settings, f'run.name="{folder.name}"', f'run.folder="{folder.parent}"')
    sets = [word for setting in asked for word in ("--set", setting)]
    command = [sys.executable, "-m", "mlx_distill", "run", str(HERE / "real" / "methods.toml")]
    subprocess.run([*command, "--backend", backend, *sets], check=True)


def validations(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


@app.command()
def write() -> None:
    """The table: a row an arm, means over its seeds; intervals are t's, paired by seed."""
    rows = read_rows(NAME)
    head = ["arm", "seeds", "KL", "× the first of its kind", "same first choice", "KL in four bits"]
    body = []
    for first, arms in groups(rows).items():
        for arm, mine in arms.items():
            ratio = DASH if arm == first else between(arms[first], mine)
            body.append(
                [arm, str(len(mine)), mean(mine, "kl"), ratio, mean(mine, "agree"), told(mine)]
            )
    one, by_arm = (
        rows[0],
        {arm: mine for found in groups(rows).values() for arm, mine in found.items()},
    )
    said = (
        f"{len(rows)} runs, {one['backend']} on {one['cpu']}; commits "
        f"{', '.join(sorted({row['commit'] for row in rows}))}. Before training the KL is "
        f"{mean(by_arm['all weights'], 'kl_before')}, without a third of the channels "
        f"{mean(by_arm[CUT], 'kl_before')}, without six layers "
        f"{mean(by_arm[SHALLOW], 'kl_before')}. In four bits, learned with them against rounded "
        f"afterwards: {between(*(by_arm[arm] for arm in ROUNDED), 'rounded_kl')} the KL."
    )
    rewrite_section(NAME, f"{said}\n\n" + table(head, body, "lrrrrr").replace("\u00a0", " "))


def groups(rows: list[dict[str, str]]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows by the arm that a group begins with, and by arm."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for arm in ARMS:
        first = next(name for name in ("all weights", "LoRA") if arm.startswith(name))
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            found.setdefault(first, {})[arm] = sorted(mine, key=lambda row: row["seed"])
    return found


def mean(rows: list[dict[str, str]], field: str) -> str:
    return f"{statistics.fmean(float(row[field]) for row in rows):.3f}"


def between(first: list[dict[str, str]], rows: list[dict[str, str]], field: str = "kl") -> str:
    """How many times the first arm's KL, with the 95 % interval over shared seeds."""
    base = {row["seed"]: float(row[field]) for row in first}
    logs = [math.log(float(row[field]) / base[row["seed"]]) for row in rows if row["seed"] in base]
    ratio = f"{math.exp(statistics.fmean(logs)):.2f} ×"
    if len(logs) < 2:
        return ratio
    low, high = (math.exp(end) for end in ttest_1samp(logs, 0).confidence_interval(0.95))
    return f"{ratio} ({low:.2f} to {high:.2f})"


def told(rows: list[dict[str, str]]) -> str:
    return mean(rows, "rounded_kl") if rows[0]["rounded_kl"] else DASH


def kept() -> Path:
    return RESULTS / f"{NAME}.csv"


if __name__ == "__main__":
    app()
