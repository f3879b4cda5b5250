"""What each divergence costs relative to forward KL: processor time and peak memory of the loss and
its gradient.

    python benchmarks/bench_divergences.py run [--framework torch]
    python benchmarks/bench_divergences.py table                    rewrite both tables only

Rows are appended to results/bench_divergences.csv. Each divergence is a process of its own with the
same inputs; repetitions go round them in turn, and times are ratios of processor time within a
repetition. The models are narrow, so that what a divergence itself costs shows: wider ones spend
more in the products that all of them share.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_loss_beside, machines, workers
from benchmarks.bench_loss_beside import ROOT, WIDTHS, Framework
from benchmarks.tables import append_rows, read_rows, rewrite_section
from mlx_distill.divergences import DIVERGENCES

ALL = (*DIVERGENCES, "dkd")
OPTIONS = ROOT / "docs" / "objectives.md"
# definition, source, field of its own, whether a top_k cache serves it
SAID = {
    "forward_kl": ("KL(t‖s)", "Hinton et al. 2015", "", True),
    "reverse_kl": ("KL(s‖t)", "Gu et al. 2024 (MiniLLM)", "", True),
    "jsd": (
        "β KL(t‖m) + (1−β) KL(s‖m), m = β t + (1−β) s",
        "Agarwal et al. 2024 (GKD)",
        "jsd_beta",
        True,
    ),
    "skew_kl": ("KL(t‖(1−α) s + α t)", "Ko et al. 2024 (DistiLLM)", "skew_alpha", True),
    "skew_reverse_kl": ("KL(s‖(1−α) t + α s)", "Ko et al. 2024 (DistiLLM)", "skew_alpha", True),
    "tvd": ("½ Σ \\|s − t\\|", "Wen et al. 2023 (f-distill)", "tvd_scale", True),
    "log_tvd": (
        "½ Σ \\|log s − log t\\| over ids that both allow",
        "the paper's code",
        'tvd_scale = "log"',
        False,
    ),
    "mixed_kl": ("w KL(t‖s) + (1−w) KL(s‖t)", "the paper's code", "mixed_weight", True),
    "entropy_kl": (
        "the same with w = H/(H + h), H the teacher's entropy",
        "after Jin et al. 2026",
        "entropy_half",
        True,
    ),
    "dkd": (
        "α KL of (target, all others) + β KL of the others, renormalised",
        "Zhao et al. 2022 (DKD)",
        "dkd_target, dkd_rest",
        True,
    ),
}
BASE = "forward_kl"
app = typer.Typer(add_completion=False)


@app.command()
def run(
    framework: Framework = Framework.mlx,
    vocab: int = 151_936,
    positions: int = 512,
    temperature: Annotated[list[float], typer.Option()] = [1.0, 2.0],  # noqa: B006
    head: Annotated[list[str], typer.Option(help="frozen, trained")] = ["frozen", "trained"],  # noqa: B006
    repetitions: int = 3,
    keep: Annotated[bool, typer.Option(help="append the rows and rewrite the table")] = True,
) -> None:
    """Measure every divergence with each head and temperature, a few at once, and keep the rows."""
    for t in temperature:
        for h in head:
            for others in (ALL[1:4], ALL[4:7], ALL[7:]):  # as many as fit into a small memory
                shape = [str(t), str(vocab), str(positions), h]
                rows = measure(framework, (BASE, *others), shape, repetitions)
                if keep:
                    append_rows("bench_divergences", rows)
    if keep:
        table()


def measure(
    framework: str, divergences: tuple[str, ...], shape: list[str], repetitions: int
) -> list[dict[str, object]]:
    """One row a divergence but the base; times and peaks are the medians of its ratios to that."""
    script = bench_loss_beside.__file__
    processes = {
        d: workers.start(script, [framework, "ours", str(ROOT), d, *shape], threads=1)
        for d in divergences
    }
    found: dict[str, list[workers.Numbers]] = {d: [] for d in divergences}
    try:
        for _ in range(repetitions):
            for d, process in processes.items():
                found[d].append(workers.ask(process))
    finally:
        for process in processes.values():
            workers.stop(process)
    facts = machines.facts(f"mlx_distill/backends/{framework}")
    names = ("temperature", "vocab", "positions", "head")
    rows = []
    for d in divergences[1:]:
        pairs = list(zip(found[d], found[BASE], strict=True))
        ratios = {
            "cpu_ratio": statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs),
            "peak_ratio": statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs),
        }
        rows.append(
            {
                **facts,
                "framework": str(framework),
                "divergence": d,
                **dict(zip(names, shape, strict=True)),
                **workers.summary(found[d]),
                **{key: f"{number:.3g}" for key, number in ratios.items()},
            }
        )
        print(*shape, d, *(f"{key} {rows[-1][key]}" for key in ratios), flush=True)
    return rows


@app.command()
def table() -> None:
    """Rewrite the tables from the kept rows: the newest row of each combination."""
    rows = read_rows("bench_divergences")
    rewrite_section("divergences", render(rows))
    rewrite_section("options", options(rows), OPTIONS)


def options(rows: list[dict[str, str]]) -> str:
    """What each divergence is and costs, for a person who chooses one."""
    newest = {
        (row["divergence"], row["framework"]): row
        for row in rows
        if (row["temperature"], row["head"]) == ("1.0", "frozen")
    }
    lines = [
        "| `divergence` | definition | source | its own fields | `top_k` cache | costs on MLX | on torch |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for d, (definition, source, fields, sparse) in SAID.items():
        name = "tvd" if d == "log_tvd" else d
        found = [newest.get((d, framework)) for framework in ("mlx", "torch")]
        costs = [f"{row['cpu_ratio']}, {row['peak_ratio']}" if row else "–" for row in found]
        if d == BASE:
            costs = ["1, 1"] * 2
        cells = [
            f"`{name}`",
            definition,
            source,
            fields and f"`{fields}`",
            "yes" if sparse else "no",
            *costs,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(rows: list[dict[str, str]]) -> str:
    keys = ("divergence", "framework", "temperature", "head")
    newest = {tuple(row[key] for key in keys): row for row in rows}
    last = rows[-1]
    shown = sorted(newest.values(), key=lambda row: row["date"])
    seen = {key: ", ".join(dict.fromkeys(row[key] for row in shown)) for key in ("cpu", "commit")}
    cases = [(f, t, h) for f in Framework for t in ("1.0", "2.0") for h in ("frozen", "trained")]
    titles = [f"{f}, T {float(t):g}, {h}" for f, t, h in cases]
    lines = [
        f"Processor time × and peak memory × of forward KL: {int(last['vocab']):,} ids, "
        f"{last['positions']} positions, widths {WIDTHS[0]} and {WIDTHS[1]}, one BLAS thread. "
        f"{seen['cpu']}, {last['cores']} cores shared with other work, {shown[0]['date'][:10]} to "
        f"{shown[-1]['date'][:10]}, commits {seen['commit']}.",
        "",
        f"| divergence | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
    ]
    for d in ALL[1:]:
        found = [newest.get((d, *case)) for case in cases]
        cells = [f"{row['cpu_ratio']}, {row['peak_ratio']}" if row else "–" for row in found]
        lines.append(f"| `{d}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
