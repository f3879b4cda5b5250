"""Time and peak memory of the distillation loss and its gradient, on MLX or on torch, beside other
ways to compute it.

    python benchmarks/bench_kd_loss.py run                     MLX: dense, chunk loop with autodiff,
    ours python benchmarks/bench_kd_loss.py run --framework torch   the paper's formulation, TRL's,
    Liger's, ours python benchmarks/bench_kd_loss.py table [--framework …]   rewrite the README's
    table only

Rows are appended to results/bench_kd_loss.csv or results/bench_kd_loss_torch.csv. Each contender is
a process of its own that holds its inputs and waits; repetitions go round the contenders in turn,
so a busy machine is busy for all of them. On a machine that is shared, CPU seconds say more than
the clock, and BLAS is better left with one thread (`--blas-threads 1`): threads that wait for each
other while others run cost neither contender what they would alone. Peak memory is over what was
held before the repetition: MLX's counter, or on torch the process's resident memory. The objective
is forward KL and cross-entropy, half each, at temperature 1. What the contenders are:
contenders_mlx.py and contenders_torch.py.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contenders_mlx, contenders_torch, machines, workers
from benchmarks.tables import append_rows, read_rows, rewrite_section
from mlx_distill.backends import chunks

WIDTHS = (256, 512)
FAMILIES = {"mlx": contenders_mlx, "torch": contenders_torch}
FILES = {"mlx": "bench_kd_loss", "torch": "bench_kd_loss_torch"}
SECTIONS = {"mlx": "kd_loss", "torch": "kd_loss_torch"}
PEERS = tuple(c for c in contenders_torch.CONTENDERS if c != "ours")
app = typer.Typer(add_completion=False)


class Framework(StrEnum):
    mlx = "mlx"
    torch = "torch"


@app.command()
def run(
    framework: Framework = Framework.mlx,
    vocab: Annotated[list[int], typer.Option()] = [32_000, 151_936],  # noqa: B006
    positions: Annotated[list[int], typer.Option()] = [512, 1024, 2048, 4096],  # noqa: B006
    head: Annotated[list[str], typer.Option(help="frozen, trained")] = ["frozen", "trained"],  # noqa: B006
    contender: Annotated[list[str], typer.Option(help="default: all of the framework's")] = [],  # noqa: B006
    chunk_tokens: Annotated[int, typer.Option(help="0: as a recipe that does not say")] = 0,
    repetitions: int = 3,
    blas_threads: Annotated[int, typer.Option(help="0: the library's choice")] = 0,
    keep: Annotated[bool, typer.Option(help="append the rows and rewrite the table")] = True,
) -> None:
    """Measure every combination and keep the rows."""
    contenders, chunk = (
        contender or list(FAMILIES[framework].CONTENDERS),
        chunks.chunk_tokens(chunk_tokens, framework, "cpu"),
    )
    for v in vocab:
        for h in head:
            for n in positions:
                rows = measure(framework, contenders, n, v, h, chunk, repetitions, blas_threads)
                if keep:
                    append_rows(FILES[framework], rows)
                    table(framework)


@app.command()
def table(framework: Framework = Framework.mlx) -> None:
    """Rewrite the README's table from the kept rows: the newest row of each combination."""
    render = {"mlx": render_mlx, "torch": render_torch}[framework]
    rewrite_section(SECTIONS[framework], render(read_rows(FILES[framework])))


@app.command(hidden=True)
def worker(
    framework: Framework, contender: str, positions: int, vocab: int, head: str, chunk_tokens: int
) -> None:
    """Hold the inputs; for every line read, one repetition and its numbers as one line of JSON."""
    family, trained = FAMILIES[framework], head == "trained"
    workers.serve(
        lambda: family.repetition(contender, positions, vocab, WIDTHS, trained, chunk_tokens)
    )


def measure(
    framework: str,
    contenders: list[str],
    positions: int,
    vocab: int,
    head: str,
    chunk_tokens: int,
    repetitions: int,
    blas_threads: int,
) -> list[dict[str, object]]:
    """One row a contender; a contender that would not fit in the memory left gets a row that says
    so.
    """
    family = FAMILIES[framework]
    fitting = [
        c
        for c in contenders
        if family.bytes_needed(c, positions, vocab) < 0.8 * machines.available_bytes()
    ]
    shape = [str(x) for x in (positions, vocab, head, chunk_tokens)]
    processes = {c: workers.start(__file__, [framework, c, *shape], blas_threads) for c in fitting}
    found: dict[str, list[workers.Numbers]] = {c: [] for c in fitting}
    try:
        for _ in range(repetitions):
            for c, process in processes.items():
                found[c].append(workers.ask(process))
    finally:
        for process in processes.values():
            workers.stop(process)
    facts = facts_of(framework)
    rows = [
        {
            **facts,
            "blas_threads": blas_threads,
            "contender": c,
            "positions": positions,
            "vocab": vocab,
            "width": WIDTHS[0],
            "teacher_width": WIDTHS[1],
            "head": head,
            "chunk_tokens": 0 if c in ("dense", *PEERS) else chunk_tokens,
            **workers.summary(found.get(c, [])),
        }
        for c in contenders
    ]
    for row in rows:
        print({k: v for k, v in row.items() if k not in facts}, flush=True)
    return rows


def facts_of(framework: str) -> dict[str, object]:
    facts = machines.facts(f"mlx_distill/backends/{framework}/loss.py")
    if framework == "mlx":
        return {**facts, **machines.versions("mlx"), "blas": machines.blas_name()}
    return {**facts, **machines.versions("torch", "trl", "liger-kernel")}


Newest = dict[tuple[int, str, int, str], dict[str, str]]


def newest_rows(rows: list[dict[str, str]]) -> Newest:
    """(vocabulary, head, positions, contender) → the last row kept."""
    return {(int(r["vocab"]), r["head"], int(r["positions"]), r["contender"]): r for r in rows}


def render_mlx(rows: list[dict[str, str]]) -> str:
    """A Markdown table of the newest row of each combination, and whether the loss keeps its three
    promises.
    """
    newest = newest_rows(rows)
    last = next(row for row in reversed(rows) if row["contender"] == "ours")
    lines = [
        f"{setting(last, newest)}, MLX {last['mlx']} with {last['blas']}, {when(last)}. Median "
        "seconds on the clock (least CPU seconds) and peak MB over the inputs; × is relative to "
        "dense in the same rounds.",
        "",
        "| vocabulary | head | positions | dense | chunk loop, autodiff | ours | clock × | CPU × "
        "| peak × |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for vocab, head, positions in sorted({key[:3] for key in newest}):
        dense, autodiff, ours = (
            newest.get((vocab, head, positions, c)) for c in contenders_mlx.CONTENDERS
        )
        ratios = [
            ratio(ours, dense, column)
            for column in ("seconds_median", "cpu_seconds_min", "peak_bytes")
        ]
        cells = [f"{vocab:,}", head, f"{positions:,}", *map(cell, (dense, autodiff, ours)), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *promises(newest, ("dense",), "dense")])


def render_torch(rows: list[dict[str, str]]) -> str:
    """The same for torch: × of time is relative to the fastest peer, of memory to the paper's
    formulation.
    """
    newest = newest_rows(rows)
    last = rows[-1]
    lines = [
        f"{setting(last, newest)}, torch {last['torch']}, TRL {last['trl']}, Liger "
        f"{last['liger_kernel']}, {when(last)}. Median seconds on the clock (least CPU seconds) "
        "and peak MB over the inputs; clock × and CPU × are relative to the best of the others in "
        "the same rounds, peak × to the paper's formulation.",
        "",
        f"| vocabulary | head | positions | {' | '.join(contenders_torch.CONTENDERS)} | clock × | "
        "CPU × | peak × |",
        f"|---:|---|---:|{'---:|' * (len(contenders_torch.CONTENDERS) + 3)}",
    ]
    for vocab, head, positions in sorted({key[:3] for key in newest}):
        row = {c: newest.get((vocab, head, positions, c)) for c in contenders_torch.CONTENDERS}
        ratios = [
            ratio(row["ours"], best(row, column), column)
            for column in ("seconds_median", "cpu_seconds_min")
        ]
        cells = [
            f"{vocab:,}",
            head,
            f"{positions:,}",
            *map(cell, row.values()),
            *ratios,
            ratio(row["ours"], row["paper"], "peak_bytes"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *promises(newest, PEERS, "the paper's formulation")])


def setting(last: dict[str, str], newest: Newest) -> str:
    threads = (
        f"{last['blas_threads']} BLAS thread(s)"
        if int(last["blas_threads"])
        else "all BLAS threads"
    )
    chunk = max(int(row["chunk_tokens"]) for row in newest.values())
    return (
        f"Forward KL + cross-entropy and its gradient; student width {last['width']}, teacher "
        f"{last['teacher_width']}, {chunk} positions per chunk. {last['cpu']}, {last['cores']} "
        f"cores shared with other work (load {load_range(newest)}), {threads}"
    )


def when(last: dict[str, str]) -> str:
    return f"Python {last['python']}, {last['date'][:10]}, commit {last['commit']}"


def load_range(newest: Newest) -> str:
    loads = [float(row["load"]) for row in newest.values()]
    return f"{min(loads):g}–{max(loads):g}"


def best(row: dict[str, dict[str, str] | None], column: str) -> dict[str, str] | None:
    """The peer with the least of a column, of those in the same rounds as ours."""
    here = [
        r
        for c, r in row.items()
        if c in PEERS and r and r[column] and row["ours"] and r["date"] == row["ours"]["date"]
    ]
    return min(here, key=lambda r: float(r[column]), default=None)


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    if not row["seconds_median"]:
        return "skipped: not enough memory left"
    seconds, cpu = float(row["seconds_median"]), float(row["cpu_seconds_min"])
    return f"{seconds:.2f} ({cpu:.2f}) s, {int(row['peak_bytes']) / 1e6:,.0f} MB"


def ratio(row: dict[str, str] | None, base: dict[str, str] | None, column: str) -> str:
    """Times are compared within a round, which all rows of one `measure` share by their date."""
    if not row or not base or not row[column] or not base[column]:
        return "–"
    if column != "peak_bytes" and row["date"] != base["date"]:
        return "–"
    return f"{float(row[column]) / float(base[column]):.2f}"


def promises(newest: Newest, peers: tuple[str, ...], dense_name: str) -> list[str]:
    """One line for each vocabulary and head whose rows suffice: growth of the peak, its share of
    dense, the worst time × the best peer.
    """
    lines = []
    for vocab, head in sorted({key[:2] for key in newest}):
        ours, dense = (
            {
                n: row
                for (v, h, n, c), row in newest.items()
                if (v, h, c) == (vocab, head, name) and row["peak_bytes"]
            }
            for name in ("ours", peers[0])
        )
        both = [n for n in ours.keys() & dense.keys() if ours[n]["date"] == dense[n]["date"]]
        if not {512, 4096} <= ours.keys() or 1024 not in both:
            continue
        growth = int(ours[4096]["peak_bytes"]) / int(ours[512]["peak_bytes"]) - 1
        shares = [
            f"{int(ours[n]['peak_bytes']) / int(dense[n]['peak_bytes']):.1%} of {dense_name} at "
            f"{n:,}"
            for n in shown(both, peers)
        ]
        clock, cpu = (
            max(worst(newest, (vocab, head, n), peers, c) for n in both)
            for c in ("seconds_median", "cpu_seconds_min")
        )
        lines.append(
            f"- {vocab:,}, {head} head: the peak grows by {growth:+.1%} from 512 to 4,096 "
            f"positions and is {' and '.join(shares)}; time at most {clock:.2f} × "
            f"{dense_name if len(peers) == 1 else 'the best peer'} on the clock, {cpu:.2f} × in "
            "CPU seconds."
        )
    return lines


def shown(both: list[int], peers: tuple[str, ...]) -> list[int]:
    """The numbers of positions at which memory is compared in words."""
    return [1024] if len(peers) == 1 else [n for n in (1024, 4096) if n in both]


def worst(newest: Newest, key: tuple[int, str, int], peers: tuple[str, ...], column: str) -> float:
    """Ours relative to the best of the peers that were measured in the same rounds."""
    ours = newest[*key, "ours"]
    rows = [newest[*key, peer] for peer in peers if (*key, peer) in newest]
    return float(ours[column]) / min(
        float(row[column]) for row in rows if row[column] and row["date"] == ours["date"]
    )


if __name__ == "__main__":
    app()
