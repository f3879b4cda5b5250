"""The distillation loss of this checkout beside that of another one: processor time, peak memory and
the loss itself, for every divergence.

    git worktree add ../old 4bf90de
    python benchmarks/bench_loss_beside.py run ../old                     MLX
    python benchmarks/bench_loss_beside.py run ../old --framework torch
    python benchmarks/bench_loss_beside.py table                          rewrite the README's table only

Rows are appended to results/bench_loss_beside.csv. Contenders are "other" (that checkout), "ours" and
on MLX "pairs alone": ours without the form that forward and reverse KL have there beside their
pair. Each is a process of its own with its inputs; repetitions alternate, so that a busy machine is
busy for all, and times are ratios of processor time within a repetition.
"""

import importlib.util
import statistics
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contenders_mlx, machines, workers
from benchmarks.tables import append_rows, read_rows, rewrite_section

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (256, 512)
CHUNK_TOKENS = {"mlx": 128, "torch": 512}
LINEAR = {"forward_kl", "reverse_kl"}  # what MLX sums without the pass over what was kept
app = typer.Typer(add_completion=False)


class Framework(StrEnum):
    mlx = "mlx"
    torch = "torch"


@app.command()
def run(
    other: Path,
    framework: Framework = Framework.mlx,
    divergence: Annotated[list[str], typer.Option()] = ["forward_kl", "reverse_kl", "jsd"],  # noqa: B006
    temperature: Annotated[list[float], typer.Option()] = [1.0, 2.0],  # noqa: B006
    vocab: Annotated[list[int], typer.Option()] = [32_000, 151_936],  # noqa: B006
    positions: Annotated[list[int], typer.Option()] = [512, 2048],  # noqa: B006
    head: Annotated[list[str], typer.Option(help="frozen, trained")] = ["frozen", "trained"],  # noqa: B006
    repetitions: int = 3,
    keep: Annotated[bool, typer.Option(help="append the rows and rewrite the table")] = True,
) -> None:
    """Measure every combination and keep the rows."""
    for v in vocab:
        for n in positions:
            for h in head:
                for d in divergence:
                    for t in temperature:
                        contenders = {"other": other.resolve(), "ours": ROOT}
                        if framework == "mlx" and d in LINEAR:
                            contenders["pairs alone"] = ROOT
                        shape = [str(word) for word in (d, t, v, n, h)]
                        rows = measure(framework, contenders, shape, repetitions)
                        if keep:
                            append_rows("bench_loss_beside", rows)
    if keep:
        table()


def measure(
    framework: str, contenders: dict[str, Path], shape: list[str], repetitions: int
) -> list[dict[str, object]]:
    """One row a contender; times and peaks are the medians of its ratios to "other"."""
    processes = {
        name: workers.start(__file__, [framework, name, str(checkout), *shape], threads=1)
        for name, checkout in contenders.items()
    }
    found: dict[str, list[workers.Numbers]] = {name: [] for name in processes}
    try:
        for _ in range(repetitions):
            for name, process in processes.items():
                found[name].append(workers.ask(process))
    finally:
        for process in processes.values():
            workers.stop(process)
    facts = machines.facts(f"mlx_distill/backends/{framework}")
    names = ("divergence", "temperature", "vocab", "positions", "head")
    rows = []
    for name, checkout in contenders.items():
        pairs = list(zip(found[name], found["other"], strict=True))
        numbers = {
            "cpu_ratio": statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs),
            "peak_ratio": statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs),
            "loss_difference": max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
        }
        rows.append(
            {
                **facts,
                "framework": str(framework),
                **dict(zip(names, shape, strict=True)),
                "contender": name,
                "checkout": machines.commit_of(checkout),
                **workers.summary(found[name]),
                **{key: f"{number:.3g}" for key, number in numbers.items()},
            }
        )
        print(*shape, name, *(f"{key} {rows[-1][key]}" for key in numbers), flush=True)
    return rows


@app.command(hidden=True)
def worker(
    framework: Framework,
    contender: str,
    checkout: Path,
    divergence: str,
    temperature: float,
    vocab: int,
    positions: int,
    head: str,
) -> None:
    """Hold the inputs; for every line read, one repetition and its numbers as one line of JSON."""
    sys.path.insert(0, str(checkout))  # before the package is first imported
    shape = (divergence, temperature, vocab, positions, head == "trained")
    if framework == "mlx":
        workers.serve(lambda: on_mlx(*shape, contender == "pairs alone"))
    else:
        workers.serve(lambda: on_torch(*shape))


def heads_of(framework: str) -> ModuleType:
    """The module of `MatrixHead`, which an older checkout has beside the loss."""
    package = f"mlx_distill.backends.{framework}"
    found = importlib.util.find_spec(f"{package}.heads")
    return importlib.import_module(f"{package}.heads" if found else f"{package}.loss")


def on_mlx(
    divergence: str, temperature: float, vocab: int, positions: int, trained: bool, alone: bool
):
    from mlx_distill.blas import load_blas

    load_blas()
    import mlx.core as mx

    from mlx_distill.backends.mlx.loss import kd_loss
    from mlx_distill.objective import Objective

    if alone:
        from mlx_distill.backends.mlx import divergences

        divergences.LINEAR.clear()
    heads = heads_of("mlx")
    objective = Objective(divergence, temperature=temperature)

    def total(hidden, matrix, teacher_hidden, teacher_matrix, targets) -> mx.array:
        rows = hidden.shape[0]
        head = heads.MatrixHead(teacher_matrix)
        rest = (mx.ones((rows,)), objective, float(rows), CHUNK_TOKENS["mlx"], trained)
        return kd_loss(hidden, matrix, teacher_hidden, head, targets, *rest).loss

    step = mx.value_and_grad(total, (0, 1) if trained else 0)
    return contenders_mlx.timed(step, positions, vocab, WIDTHS)


def on_torch(divergence: str, temperature: float, vocab: int, positions: int, trained: bool):
    import time

    import torch

    from mlx_distill.backends.torch.loss import kd_loss
    from mlx_distill.objective import Objective

    objective = Objective(divergence, temperature=temperature)
    random = torch.Generator().manual_seed(0)
    shapes = [(n, width) for width in WIDTHS for n in (positions, vocab)]
    hidden, matrix, teacher_hidden, teacher_matrix = (
        torch.randn(shape, generator=random) * (1.0 if shape[0] == positions else 0.1)
        for shape in shapes
    )
    targets = torch.randint(0, vocab, (positions,), generator=random)
    hidden.requires_grad_(), matrix.requires_grad_(trained)
    rest = (torch.ones(positions), objective, float(positions), CHUNK_TOKENS["torch"], trained)
    memory, heads = machines.PeakMemory(cuda=False), heads_of("torch")

    def repeat() -> workers.Numbers:
        hidden.grad = matrix.grad = None
        memory.start()
        start, cpu_start = time.perf_counter(), time.process_time()
        head = heads.MatrixHead(teacher_matrix)
        value = kd_loss(hidden, matrix, teacher_hidden, head, targets, *rest).loss
        value.backward()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "loss": value.item(),
            **memory.stop(),
        }

    repeat()
    return repeat


@app.command()
def table() -> None:
    """Rewrite the README's table from the kept rows: the newest row of each combination."""
    rewrite_section("loss_beside", render(read_rows("bench_loss_beside")))


def render(rows: list[dict[str, str]]) -> str:
    keys = ("framework", "divergence", "temperature", "vocab", "positions", "head", "contender")
    newest = {tuple(row[key] for key in keys): row for row in rows}
    other = next(row for row in reversed(rows) if row["contender"] == "other")
    lines = [
        f"This checkout relative to commit {other['checkout']}: medians of ratios within a repetition, "
        f"one BLAS thread. {other['cpu']}, {other['cores']} cores shared with other work, "
        f"{other['date'][:10]}, commit {other['commit']}. Each cell is the median, and the smallest and "
        "the largest, of its rows: vocabularies, numbers of positions and heads.",
        "",
        "| framework | divergence | T | rows | CPU × | peak × | loss differs by | pairs alone, CPU × "
        "| peak × |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group in sorted({key[:3] for key in newest}):
        ours, alone = (
            [row for key, row in newest.items() if key[:3] == group and key[-1] == name]
            for name in ("ours", "pairs alone")
        )
        cells = [
            *group,
            str(len(ours)),
            span(ours, "cpu_ratio"),
            span(ours, "peak_ratio"),
            f"{max(float(row['loss_difference']) for row in ours):.0e}",
            span(alone, "cpu_ratio"),
            span(alone, "peak_ratio"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(rows: list[dict[str, str]], column: str) -> str:
    found = [float(row[column]) for row in rows]
    if not found:
        return "–"
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


if __name__ == "__main__":
    app()
