"""With which power of its size each part of the program grows: processor seconds and peak memory.

    python benchmarks/bench_growth.py run [--part loss-positions]…   append to
                                        results/bench_growth.csv as parts end, rewrite the table
    python benchmarks/bench_growth.py run --tiny                     two small sizes, nothing kept
    python benchmarks/bench_growth.py table                          rewrite the README's table only

Each size is a process of its own with one thread; repetitions go round the sizes in turn. What is
measured is in growth_models.py and growth_rows.py. An exponent is the slope of a straight line
through the logarithms (least squares) with its 95 % interval; a fixed cost makes it smaller, so the
slope between the two largest sizes stands beside it. Needs a machine with nothing else to do.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import growth_models, growth_rows, machines, workers
from benchmarks.growth_models import Repetition, trunk_operations
from benchmarks.tables import append_rows, read_rows, rewrite_section
from mlx_distill.words import amount

FILE = "bench_growth"
BOTH, KINDS = ("mlx", "torch"), ("top_k", "sampled", "hidden")
app = typer.Typer(add_completion=False)


# (part, thing, backend) → the newest row of each size
Groups = dict[tuple[str, str, str], dict[int, dict[str, str]]]


class Part(NamedTuple):
    """What is measured over which sizes, on which backends (of a cache: its kinds)."""

    make: Callable[[int, str, Path], Repetition]
    title: str
    variable: str
    sizes: tuple[int, ...]
    tiny: tuple[int, int]
    backends: tuple[str, ...] = ("",)
    rounds: int = 3


ROWS = (1_000, 3_000, 10_000, 30_000, 100_000)
POSITIONS = (512, 1024, 2048, 4096, 8192)
VOCABULARIES = (8_000, 16_000, 32_000, 64_000, 151_936)
TOKENS = (256, 512, 1024, 2048, 4096)
WIDTHS = (128, 256, 512, 1024, 2048)  # 1 to 205 million weights
RUNS = (10, 30, 100, 300, 1000)
PARTS = {
    "loss-positions": Part(
        growth_models.loss_over_positions, "", "positions N", POSITIONS, (8, 16), BOTH
    ),
    "loss-vocabulary": Part(
        growth_models.loss_over_vocabulary, "", "ids V", VOCABULARIES, (64, 128), BOTH
    ),
    "trunk": Part(growth_models.trunk, "", "tokens T", TOKENS, (32, 64), BOTH, 2),
    "rows": Part(growth_rows.rows, "rows", "rows", ROWS, (20, 40), rounds=2),
    "cache": Part(growth_rows.cache, "teacher cache", "rows", ROWS, (20, 40), KINDS, 2),
    "checkpoint": Part(growth_models.checkpoint, "checkpoint", "weights", WIDTHS, (32, 64), BOTH),
    "page": Part(growth_rows.page, "sweep", "runs", RUNS, (10, 20), rounds=2),
}


@app.command()
def run(
    part: Annotated[list[str], typer.Option(help="default: all")] = [],  # noqa: B006
    tiny: Annotated[bool, typer.Option(help="in this process, two sizes, nothing kept")] = False,
) -> None:
    for name in part or PARTS:
        for backend in PARTS[name].backends:
            with tempfile.TemporaryDirectory() as scratch:
                found = measure_here if tiny else measure
                rows = found(name, backend, Path(scratch))
            for row in rows:
                shown = ("part", "thing", "backend", "size", "cpu_seconds", "peak_bytes")
                print(*(row[key] for key in shown), flush=True)
            if not tiny:
                append_rows(FILE, rows)
                table()


def measure(name: str, backend: str, scratch: Path) -> list[dict[str, object]]:
    """A row for each size and thing, of processes that took turns."""
    part = PARTS[name]
    running: dict[int, object] = {}
    found: dict[int, list[dict[str, workers.Numbers]]] = {size: [] for size in part.sizes}
    try:
        for size in part.sizes:
            words = [name, backend or "-", str(size), str(scratch)]
            running[size] = workers.start(__file__, words, threads=1)
        for _ in range(part.rounds):
            for size, worker in running.items():
                found[size].append(workers.ask(worker))
    finally:
        for worker in running.values():
            workers.stop(worker)
    return rows_of(name, backend, found)


def measure_here(name: str, backend: str, scratch: Path) -> list[dict[str, object]]:
    """The same in this process, for the two small sizes."""
    make = PARTS[name].make
    found = {size: [make(size, backend, scratch)()] for size in PARTS[name].tiny}
    return rows_of(name, backend, found)


def rows_of(
    name: str, backend: str, found: dict[int, list[dict[str, workers.Numbers]]]
) -> list[dict[str, object]]:
    facts, rows = machines.facts("mlx_distill"), []
    for size, repetitions in found.items():
        for thing in repetitions[0]:
            numbers = [one[thing] for one in repetitions]
            row = {
                "part": name,
                "thing": thing,
                "backend": backend,
                "size": int(numbers[0].get("size", size)),
                "rounds": len(numbers),
                "seconds": round(statistics.median(one["seconds"] for one in numbers), 5),
                "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in numbers), 5),
                "cpu_seconds_min": round(min(one["cpu_seconds"] for one in numbers), 5),
                "peak_bytes": int(max(one["peak_bytes"] for one in numbers)),
            }
            rows.append({**facts, **libraries(backend), **row})
    return rows


@cache
def libraries(backend: str) -> dict[str, str]:
    """Their versions, and which BLAS MLX runs on."""
    blas = machines.blas_name() if backend == "mlx" else ""
    return {**machines.versions("mlx", "torch"), "blas": blas}


# exponents


class Fit(NamedTuple):
    """The exponent over all sizes with half of its 95 % interval, and that between the largest two;
    nan where there are too few sizes, or numbers that are not positive.
    """

    exponent: float
    half: float
    last: float


def fitted(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """By least squares on the logarithms."""
    from scipy import stats

    if min(values) <= 0 or len(sizes) < 2:
        return Fit(np.nan, np.nan, np.nan)
    x, y = np.log(sizes), np.log(values)
    line = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * line.stderr if len(x) > 2 else np.nan
    return Fit(float(line.slope), float(half), float((y[-1] - y[-2]) / (x[-1] - x[-2])))


def square_share(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of the time at the largest size, what grows with its square: the best a + b T² + c T of
    numbers that are not negative, by relative errors.
    """
    from scipy.optimize import nnls

    x, y = np.array(sizes, float), np.array(seconds)
    terms = np.stack([np.ones_like(x), x, x**2], axis=1)
    found, _ = nnls(terms / y[:, None], np.ones_like(y))
    parts = terms[-1] * found
    return float(parts[2] / parts.sum())


# the table


@app.command()
def table() -> None:
    """Rewrite the section `growth` of README.md from the newest row of each size."""
    rewrite_section("growth", rendered(read_rows(FILE)))


def rendered(rows: list[dict[str, str]]) -> str:
    groups: Groups = {}
    for row in rows:
        key = row["part"], row["thing"], row["backend"]
        groups.setdefault(key, {})[int(row["size"])] = row
    last = rows[-1]
    blas = next((row["blas"] for row in reversed(rows) if row["blas"]), "")
    loads = [float(row["load"]) for one in groups.values() for row in one.values()]
    commits = ", ".join(sorted({row["commit"] for one in groups.values() for row in one.values()}))
    lines = [
        f"Medians of two or three repetitions, one thread. {last['cpu']}, {last['cores']} cores "
        f"shared with other work (load {min(loads):g} to {max(loads):g}), "
        f"MLX {last['mlx']} (BLAS: {blas}), torch {last['torch']}, Python {last['python']}, "
        f"{last['date'][:10]}, commit {commits}.",
        "",
        "| what | over | processor seconds | exponent | at the top | peak | exponent |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part in PARTS:
        lines += [
            table_row(PARTS[part], thing, backend, groups[found, thing, backend])
            for found, thing, backend in groups
            if found == part
        ]
    return "\n".join([*lines, "", *summary(groups)])


def table_row(part: Part, thing: str, backend: str, by_size: dict[int, dict[str, str]]) -> str:
    sizes = sorted(by_size)
    seconds, peaks = (
        [float(by_size[size][column]) for size in sizes] for column in ("cpu_seconds", "peak_bytes")
    )
    time, peak = fitted(sizes, seconds), fitted(sizes, [peak + 1 for peak in peaks])
    on = f", {backend}" if backend in BOTH else ""
    over = f"{part.variable}, {amount(sizes[0])} to {amount(sizes[-1])}"
    ends = f"{seconds[0]:.3g} to {seconds[-1]:.3g}"
    held = f"{amount(peaks[0], 'B')} to {amount(peaks[-1], 'B')}"
    cells = [
        f"{part.title}: {thing}{on}" if part.title else f"{thing}{on}",
        over,
        ends,
        said(time),
        f"{time.last:.2f}",
        held,
        said(peak),
    ]
    return f"| {' | '.join(cells)} |".replace("\u00a0", " ")


def said(fit: Fit) -> str:
    if np.isnan(fit.half):
        return "–" if np.isnan(fit.exponent) else f"{fit.exponent:.2f}"
    return f"{fit.exponent:.2f} ± {fit.half:.2f}"


def summary(groups: Groups) -> list[str]:
    """The largest exponents, and of the trunk what grows with the square of its tokens."""
    found: dict[str, list[Fit]] = {}
    squares = []
    for (part, thing, backend), by_size in groups.items():
        sizes = sorted(by_size)
        seconds = [float(by_size[size]["cpu_seconds"]) for size in sizes]
        found.setdefault(part.partition("-")[0], []).append(fitted(sizes, seconds))
        if part == "trunk":
            squares.append(f"{thing}, {backend} {square_share(sizes, seconds):.0%}")
            tokens = sizes
    loss = found.pop("loss")
    found.pop("trunk")
    others = [fit for fits in found.values() for fit in fits]
    plain, squared = np.array([trunk_operations(size) for size in tokens]).T
    counted = fitted(tokens, plain + squared)
    return [
        f"- The loss: exponents of time of at most {max(fit.exponent for fit in loss):.2f} (asked: "
        f"1.05). All that should grow with its size but the trunk: at most "
        f"{max(fit.exponent for fit in others):.2f}, at the top {max(fit.last for fit in others):.2f}.",
        f"- The trunk's operations as cost/flops.py counts them grow with {counted.exponent:.2f} "
        f"({counted.last:.2f} at the top); at {tokens[-1]:,} tokens "
        f"{squared[-1] / (plain + squared)[-1]:.0%} of them are attention's, which grow with the "
        f"square. The square's part of the time there: {', '.join(squares)}.",
    ]


def worker(name: str, backend: str, size: str, scratch: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    make = PARTS[name].make
    workers.serve(lambda: make(int(size), backend.replace("-", ""), Path(scratch)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        app()
