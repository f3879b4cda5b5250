"""Time and peak memory of the distillation loss and its gradient: dense, chunk loop with autodiff, and ours.

    python benchmarks/bench_kd_loss.py run      measure, append to results/bench_kd_loss.csv, rewrite the README's table
    python benchmarks/bench_kd_loss.py table    rewrite the table only

Each contender is a process of its own that holds its inputs and waits; repetitions go round the contenders in turn, so
a busy machine is busy for all of them. On a machine that is shared, CPU seconds say more than the clock, and BLAS is
better left with one thread (`--blas-threads 1`): threads that wait for each other while others run cost neither
contender what they would alone. Peak memory is MLX's peak during a repetition less what was active before it.
The objective is forward KL and cross-entropy, half each, at temperature 1.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import append_rows, read_rows, rewrite_section

CONTENDERS = ("dense", "autodiff", "ours")
WIDTH, TEACHER_WIDTH = 256, 512
DENSE_TENSORS = 9  # float32 [N, V] tensors at the dense formula's peak on a CPU, for what to skip
app = typer.Typer(add_completion=False)


@app.command()
def run(
    vocab: Annotated[list[int], typer.Option()] = [32_000, 151_936],  # noqa: B006
    positions: Annotated[list[int], typer.Option()] = [512, 1024, 2048, 4096],  # noqa: B006
    head: Annotated[list[str], typer.Option(help="frozen, trained")] = ["frozen", "trained"],  # noqa: B006
    contender: Annotated[list[str], typer.Option()] = list(CONTENDERS),  # noqa: B006
    chunk_tokens: int = 128,
    repetitions: int = 3,
    blas_threads: Annotated[int, typer.Option(help="0: the library's choice")] = 0,
) -> None:
    """Measure every combination and keep the rows."""
    for v in vocab:
        for h in head:
            for n in positions:
                rows = measure(contender, n, v, h, chunk_tokens, repetitions, blas_threads)
                append_rows("bench_kd_loss", rows)
                table()


@app.command()
def table() -> None:
    """Rewrite the README's table from the kept rows: the newest row of each combination."""
    rewrite_section("kd_loss", render(read_rows("bench_kd_loss")))


def measure(
    contenders: list[str], positions: int, vocab: int, head: str, chunk_tokens: int, repetitions: int,
    blas_threads: int,
) -> list[dict[str, object]]:
    """One row a contender; a contender that would not fit in the memory left gets a row that says so."""
    needed = DENSE_TENSORS * positions * vocab * 4
    fitting = [c for c in contenders if c == "ours" or needed < 0.8 * available_bytes()]
    shape = [str(x) for x in (positions, vocab, head, chunk_tokens)]
    workers = {c: start_worker(c, shape, blas_threads) for c in fitting}
    found: dict[str, list[dict[str, float]]] = {c: [] for c in fitting}
    try:
        for _ in range(repetitions):
            for c, worker in workers.items():
                found[c].append(ask(worker))
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.wait()
    facts = machine()
    rows = [
        {
            **facts, "blas_threads": blas_threads, "contender": c, "positions": positions, "vocab": vocab,
            "width": WIDTH, "teacher_width": TEACHER_WIDTH, "head": head,
            "chunk_tokens": chunk_tokens if c != "dense" else 0, **summary(found.get(c, [])),
        }
        for c in contenders
    ]
    for row in rows:
        print({k: v for k, v in row.items() if k not in facts}, flush=True)
    return rows


def summary(repetitions: list[dict[str, float]]) -> dict[str, object]:
    """Empty cells for a contender that was skipped."""
    if not repetitions:
        names = ("repetitions", "seconds_min", "seconds_median", "cpu_seconds_min", "peak_bytes", "loss")
        return dict.fromkeys(names, "")
    seconds = [r["seconds"] for r in repetitions]
    return {
        "repetitions": len(repetitions), "seconds_min": round(min(seconds), 4),
        "seconds_median": round(statistics.median(seconds), 4),
        "cpu_seconds_min": round(min(r["cpu_seconds"] for r in repetitions), 4),
        "peak_bytes": int(max(r["peak_bytes"] for r in repetitions)), "loss": round(repetitions[0]["loss"], 6),
    }


def start_worker(contender: str, shape: list[str], blas_threads: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "worker", contender, *shape]
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS") if blas_threads else ()
    environment = {**os.environ, **dict.fromkeys(names, str(blas_threads))}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen) -> dict[str, float]:
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(worker.args[2:])} ended with code {worker.wait()}")
    return json.loads(line)


@app.command(hidden=True)
def worker(contender: str, positions: int, vocab: int, head: str, chunk_tokens: int) -> None:
    """Hold the inputs; for every line read, one repetition and its numbers as one line of JSON."""
    from mlx_distill.blas import load_blas

    load_blas()
    import mlx.core as mx

    step = build(contender, vocab, head == "trained", chunk_tokens)
    mx.eval(step(*inputs(8, vocab)))  # kernels are compiled here, not in the first repetition
    arrays = inputs(positions, vocab)
    for _ in sys.stdin:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        value, gradients = step(*arrays)
        mx.eval(value, gradients)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": mx.get_peak_memory() - before}
        print(json.dumps({**found, "loss": value.item()}), flush=True)
        del value, gradients


def inputs(positions: int, vocab: int) -> tuple:
    """hidden [N, D], matrix [V, D], teacher_hidden [N, Dt], teacher_matrix [V, Dt], targets [N]."""
    import mlx.core as mx

    mx.random.seed(0)
    shapes = (positions, WIDTH), (vocab, WIDTH), (positions, TEACHER_WIDTH), (vocab, TEACHER_WIDTH)
    hidden, matrix, teacher_hidden, teacher_matrix = (mx.random.normal(shape) for shape in shapes)
    arrays = (hidden, 0.1 * matrix, teacher_hidden, 0.1 * teacher_matrix, mx.random.randint(0, vocab, (positions,)))
    mx.eval(arrays)
    return arrays


def build(contender: str, vocab: int, trained: bool, chunk_tokens: int):
    """`inputs` → (loss, gradients with respect to the hidden states and, if trained, the student's matrix)."""
    import mlx.core as mx

    from mlx_distill.backends.mlx.loss import MatrixHead, kd_loss
    from mlx_distill.objective import Objective

    def log_softmax(logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def dense_sum(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        student, teacher = log_softmax(hidden @ matrix.T), log_softmax(teacher_hidden @ teacher_matrix.T)
        kd = (mx.exp(teacher) * (teacher - student)).sum(axis=-1)
        ce = -mx.take_along_axis(student, targets[:, None], axis=1)[:, 0]
        return (0.5 * kd + 0.5 * ce).sum()

    def dense(hidden, *rest):
        return dense_sum(hidden, *rest) / hidden.shape[0]

    def autodiff(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        total = mx.array(0.0)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            total = total + dense_sum(hidden[rows], matrix, teacher_hidden[rows], teacher_matrix, targets[rows])
        return total / hidden.shape[0]

    def ours(hidden, matrix, teacher_hidden, teacher_matrix, targets):
        weight, rows = mx.ones(targets.shape), hidden.shape[0]
        head = MatrixHead(teacher_matrix)
        return kd_loss(
            hidden, matrix, teacher_hidden, head, targets, weight, Objective(), float(rows), chunk_tokens, trained
        ).loss

    step = mx.value_and_grad({"dense": dense, "autodiff": autodiff, "ours": ours}[contender], (0, 1) if trained else 0)
    return mx.compile(step) if contender == "dense" else step


def machine() -> dict[str, object]:
    """What a number depends on beside the code; `load` is the machine's run queue while measuring."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(), "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1), "python": platform.python_version(), "mlx": version("mlx"),
        "blas": blas_name(),
    }


def blas_name() -> str:
    code = "from mlx_distill.blas import load_blas; print(load_blas().name)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout.strip()


def commit() -> str:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder).stdout.strip()

    changed = git("status", "--porcelain", "--", "../mlx_distill/backends/mlx/loss.py")
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+changes" if changed else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def available_bytes() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def render(rows: list[dict[str, str]]) -> str:
    """A Markdown table of the newest row of each combination, and whether the loss keeps its three promises."""
    newest = {(int(r["vocab"]), r["head"], int(r["positions"]), r["contender"]): r for r in rows}
    last = next(row for row in reversed(rows) if row["contender"] == "ours")
    threads = f"{last['blas_threads']} BLAS thread(s)" if int(last["blas_threads"]) else "all BLAS threads"
    lines = [
        f"Forward KL + cross-entropy and its gradient; student width {last['width']}, teacher {last['teacher_width']}, "
        f"{last['chunk_tokens']} positions per chunk. {last['cpu']}, {last['cores']} cores shared with other work "
        f"(load {load_range(newest)}), {threads}, MLX {last['mlx']} with {last['blas']}, Python {last['python']}, "
        f"{last['date'][:10]}, commit {last['commit']}. Median seconds on the clock (least CPU seconds) and peak MB "
        "over the inputs; × is relative to dense in the same rounds.",
        "",
        "| vocabulary | head | positions | dense | chunk loop, autodiff | ours | clock × | CPU × | peak × |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for vocab, head, positions in sorted({key[:3] for key in newest}):
        dense, autodiff, ours = (newest.get((vocab, head, positions, c)) for c in CONTENDERS)
        ratios = [ratio(ours, dense, column) for column in ("seconds_median", "cpu_seconds_min", "peak_bytes")]
        cells = [f"{vocab:,}", head, f"{positions:,}", *map(cell, (dense, autodiff, ours)), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *promises(newest)])


def load_range(newest: dict[tuple, dict[str, str]]) -> str:
    loads = [float(row["load"]) for row in newest.values()]
    return f"{min(loads):g}–{max(loads):g}"


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


def promises(newest: dict[tuple, dict[str, str]]) -> list[str]:
    """One line for each vocabulary and head whose rows suffice."""
    lines = []
    for vocab, head in sorted({key[:2] for key in newest}):
        ours, dense = (
            {n: row for (v, h, n, c), row in newest.items() if (v, h, c) == (vocab, head, name) and row["peak_bytes"]}
            for name in ("ours", "dense")
        )
        both = [n for n in ours.keys() & dense.keys() if ours[n]["date"] == dense[n]["date"]]
        if not {512, 4096} <= ours.keys() or 1024 not in both:
            continue
        growth = int(ours[4096]["peak_bytes"]) / int(ours[512]["peak_bytes"]) - 1
        share = int(ours[1024]["peak_bytes"]) / int(dense[1024]["peak_bytes"])
        clock, cpu = (max(float(ours[n][c]) / float(dense[n][c]) for n in both) for c in
                      ("seconds_median", "cpu_seconds_min"))
        lines.append(
            f"- {vocab:,}, {head} head: the peak grows by {growth:+.1%} from 512 to 4,096 positions and is {share:.1%} "
            f"of dense at 1,024; time at most {clock:.2f} × dense on the clock, {cpu:.2f} × in CPU seconds."
        )
    return lines


if __name__ == "__main__":
    app()
