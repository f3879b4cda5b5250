"""A training step on MLX, ours in pairs with mlx-lm's own and with one on unsloth_zoo's losses.

    python benchmarks/bench_step.py mlx run --model models/SmolLM2-135M-Instruct
    python benchmarks/bench_step.py mlx profile --model …      where a step's time goes, by kernel
    python benchmarks/bench_step.py mlx table                  rewrite the README's tables only

Both of a pair are processes that hold their models and take turns, one step at a time, so that a
busy machine is busy for both; what counts is processor time, and the ratio is the median of the
rounds' ratios. One BLAS thread, and the same BLAS for both. Peak memory is MLX's own counter:
weights, optimizer and all. What the contenders do is written in steps_mlx.py. Rows are appended to
results/step_mlx.csv and results/step_mlx_kernels.csv. `profile` needs Linux's `perf`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machines, models_torch, steps_mlx, workers
from benchmarks.tables import RESULTS, append_rows, read_rows, rewrite_section

PAIRS, KERNELS = "step_mlx", "step_mlx_kernels"
CASES = (("lora", "ce"), ("lora", "kd"), ("full", "ce"), ("full", "kd"))
WORDS = {
    "mlx-lm": "mlx-lm's step and loss",
    "unsloth-cce": "mlx-lm's step, unsloth_zoo's chunked cross-entropy",
    "unsloth-gkd": "mlx-lm's step, unsloth_zoo's loss of a teacher",
}
TASKS = {"ce": "cross-entropy", "kd": "forward KL"}
app = typer.Typer(add_completion=False)
Model = Annotated[str, typer.Option(help="a Hugging Face folder")]
Case = Annotated[list[str], typer.Option(help="lora-ce, lora-kd, full-ce, full-kd; default: all")]


@app.command()
def run(
    model: Model = "models/SmolLM2-135M-Instruct",
    case: Case = [],  # noqa: B006
    batch: int = 1,
    tokens: int = 256,
    prompt_tokens: int = 1,
    rounds: int = 5,
    keep: Annotated[bool, typer.Option(help="append the rows and rewrite the tables")] = True,
) -> None:
    """Measure every pair and keep the rows."""
    with tempfile.TemporaryDirectory() as scratch:
        teacher = str(models_torch.noisy_copy(Path(model), Path(scratch) / "teacher", "float32"))
        for tuning, term in chosen(case):
            asked = steps_mlx.Case(model, teacher, tuning, term, batch, tokens, prompt_tokens)
            for peer in steps_mlx.PEERS[term]:
                row = measure(asked, peer, rounds)
                print(row, flush=True)
                if keep:
                    append_rows(PAIRS, [row])
                    table()


@app.command()
def profile(
    model: Model = "models/SmolLM2-135M-Instruct",
    case: Case = [],  # noqa: B006
    batch: int = 1,
    tokens: int = 256,
    prompt_tokens: int = 1,
    steps: int = 5,
    contender: str = "ours",
    keep: bool = True,
) -> None:
    """Where the processor time of a step goes, by kernel, as `perf` samples it."""
    with tempfile.TemporaryDirectory() as scratch:
        teacher = str(models_torch.noisy_copy(Path(model), Path(scratch) / "teacher", "float32"))
        for tuning, term in chosen(case):
            asked = steps_mlx.Case(model, teacher, tuning, term, batch, tokens, prompt_tokens)
            rows = kernels(asked, contender, steps, Path(scratch) / "perf")
            for row in rows:
                print(f"{row['seconds']:.3f} s {row['share']:6.1%}  {row['kernel']}")
            if keep:
                append_rows(KERNELS, rows)
                table()


@app.command()
def table() -> None:
    """Rewrite the README's tables from the kept rows: the newest of each pair and case."""
    rewrite_section(PAIRS, render(read_rows(PAIRS)))
    if (RESULTS / f"{KERNELS}.csv").exists():
        rewrite_section(KERNELS, render_kernels(read_rows(KERNELS)))


@app.command(hidden=True)
def worker(contender: str, settings: str) -> None:
    """Hold the models; for every line read, one step and its numbers as one line of JSON."""
    steps_mlx.run(contender, steps_mlx.Case(**json.loads(settings)), workers.requests())


def chosen(case: list[str]) -> list[tuple[str, ...]]:
    return [tuple(one.split("-")) for one in case] or list(CASES)


def measure(case: steps_mlx.Case, peer: str, rounds: int) -> dict[str, object]:
    """One pair's row. The first round is not measured."""
    names = ("ours", peer)
    processes = {name: start(name, case) for name in names}
    found: dict[str, list[workers.Numbers]] = {name: [] for name in names}
    try:
        for turn in range(rounds + 1):
            for name in names if turn % 2 else reversed(names):
                numbers = workers.ask(processes[name])
                if turn:
                    found[name].append(numbers)
    finally:
        for process in processes.values():
            workers.stop(process)
    ours, theirs = (found[name] for name in names)
    times = [[one["cpu_seconds"] for one in rows] for rows in (ours, theirs)]
    ratios = [mine / other for mine, other in zip(*times, strict=True)]
    peaks = [max(one["peak_bytes"] for one in rows) for rows in (ours, theirs)]
    return {
        **facts_of(case),
        "tuning": case.tuning,
        "term": case.term,
        "peer": peer,
        "rounds": rounds,
        "ours_cpu_seconds": round(statistics.median(times[0]), 3),
        "peer_cpu_seconds": round(statistics.median(times[1]), 3),
        "cpu_ratio": round(statistics.median(ratios), 3),
        "cpu_ratio_min": round(min(ratios), 3),
        "cpu_ratio_max": round(max(ratios), 3),
        "ours_peak_bytes": peaks[0],
        "peer_peak_bytes": peaks[1],
        "ours_held_bytes": ours[-1]["held_bytes"],
        "peer_held_bytes": theirs[-1]["held_bytes"],
        "peak_ratio": round(peaks[0] / peaks[1], 3),
        "loss": round(ours[0]["loss"], 6),
        "loss_differs": f"{abs(theirs[0]['loss'] / ours[0]['loss'] - 1):.1g}",
        "norm_differs": f"{abs(theirs[0]['grad_norm'] / ours[0]['grad_norm'] - 1):.1g}",
    }


def start(name: str, case: steps_mlx.Case) -> subprocess.Popen:
    return workers.start(__file__, [name, json.dumps(asdict(case))], threads=1)


def facts_of(case: steps_mlx.Case) -> dict[str, object]:
    return {
        **machines.facts("mlx_distill/backends/mlx"),
        **machines.versions("mlx", "mlx-lm"),
        "unsloth_zoo": machines.installed("unsloth_zoo"),
        "blas": machines.blas_name(),
        "model": Path(case.student).name,
        "batch": case.batch,
        "tokens": case.tokens,
        "positions": case.batch * (case.tokens - case.prompt_tokens),
    }


def render(rows: list[dict[str, str]]) -> str:
    newest = {(row["tuning"], row["term"], row["peer"]): row for row in rows}
    last = rows[-1]
    lines = [
        f"{last['model']}, {last['batch']} × {last['tokens']} tokens, {last['positions']} of them "
        f"supervised, float32. {last['cpu']}, one thread of {last['cores']} cores shared with other "
        f"work, MLX {last['mlx']} with {last['blas']}, mlx-lm {last['mlx_lm']}, unsloth_zoo "
        f"{last['unsloth_zoo']}, {last['date'][:10]}, commit {last['commit']}. Processor seconds of "
        "a step (medians), and × the peer's: median of the rounds (smallest to largest).",
        "",
        "| weights | loss | beside | ours | the peer | CPU × | peak, ours | the peer's | peak × | "
        "loss, norm differ by |",
        f"|---|---|---|{'---:|' * 7}",
    ]
    for tuning, term in CASES:
        for peer in steps_mlx.PEERS[term]:
            row = newest.get((tuning, term, peer))
            if row:
                lines.append(line_of(row))
    return "\n".join(lines)


def line_of(row: dict[str, str]) -> str:
    seconds = (f"{float(row[f'{who}_cpu_seconds']):.2f} s" for who in ("ours", "peer"))
    peaks = (f"{int(row[f'{who}_peak_bytes']) / 1e6:,.0f} MB" for who in ("ours", "peer"))
    spread = f"{float(row['cpu_ratio_min']):.2f}–{float(row['cpu_ratio_max']):.2f}"
    cells = [
        {"lora": "LoRA", "full": "full"}[row["tuning"]],
        TASKS[row["term"]],
        WORDS[row["peer"]],
        *seconds,
        f"{float(row['cpu_ratio']):.2f} ({spread})",
        *peaks,
        f"{float(row['peak_ratio']):.2f}",
        f"{row['loss_differs']}, {row['norm_differs']}",
    ]
    return f"| {' | '.join(cells)} |"


# where the time goes

GROUPS = (  # of a step's time by the names of its symbols; the first that fits
    ("matrix products: the product", ("gemm_kernel", "sgemm_small", "gemv")),
    (
        "matrix products: packing their inputs",
        ("copy_SKYLAKEX", "copy_HASWELL", "copy_ZEN", "gemm_beta"),
    ),
    (
        "matrix products: the rest of BLAS",
        ("libscipy_openblas", "libopenblas", "libmkl", "libtorch"),
    ),
    ("softmax of attention", ("softmax",)),
    ("silu (sigmoid and exponentials)", ("Sigmoid", "simd::exp", "__exp", "expf", "libm.so")),
    ("sums and maxima", ("reduction_op", "SumReduce", "MaxReduce", "ArgReduce", "arg_reduce")),
    ("norms and rotary embeddings", ("RMSNorm", "LayerNorm", "RoPE", "Rope")),
    ("AdamW: squares and roots", ("Square", "Sqrt")),
    ("other compiled passes", ("compiled_kernel", "f4I", "mlx_compiled")),
    ("products by element", ("Multiply",)),
    ("sums by element", ("::Add",)),
    ("other passes by element", ("binary_op", "unary_op", "ternary_op", "Select")),
    ("copies, transposes, scatters", ("copy", "memmove", "memcpy", "memset", "scatter", "gather")),
    ("MLX, all else", ("libmlx",)),
    ("the kernel: pages and scheduling", ("[k]", "kernel.kallsyms")),
    ("Python and the graph", ("libpython", "core.cpython", "libstdc++", "malloc", "libc.so")),
)


def kernels(
    case: steps_mlx.Case, contender: str, steps: int, file: Path
) -> list[dict[str, object]]:
    """Rows by kind of kernel, the largest first: seconds of a step and their share."""
    process = start(contender, case)
    try:
        workers.ask(process)  # compiles
        sampler = subprocess.Popen(
            ["perf", "record", "-q", "-F", "499", "-p", str(process.pid), "-o", str(file)]
        )
        found = [workers.ask(process) for _ in range(steps)]
        sampler.terminate()
        sampler.wait()
    finally:
        workers.stop(process)
    total = statistics.mean(one["cpu_seconds"] for one in found)
    shares: dict[str, float] = defaultdict(float)
    for share, symbol in samples(file):
        shares[kind_of(symbol)] += share
    whole = sum(shares.values())
    facts = facts_of(case)  # once: all rows of a profile carry one date
    return [
        {
            **facts,
            "tuning": case.tuning,
            "term": case.term,
            "contender": contender,
            "kernel": kernel,
            "seconds": round(total * share / whole, 4),
            "share": round(share / whole, 4),
        }
        for kernel, share in sorted(shares.items(), key=lambda pair: -pair[1])
    ]


def samples(file: Path) -> list[tuple[float, str]]:
    """(share of the samples, library and symbol)"""
    command = ["perf", "report", "-i", str(file), "--no-children", "--sort", "dso,symbol"]
    command += ["-t", "\t", "--stdio"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    parted = (line.strip().split("\t", 1) for line in lines)
    return [(float(share.strip().rstrip("%")), symbol) for share, symbol in parted]


def kind_of(symbol: str) -> str:
    return next((kind for kind, names in GROUPS if any(n in symbol for n in names)), "all else")


def render_kernels(rows: list[dict[str, str]]) -> str:
    """Of each case and contender its newest profile, a column each."""
    last = {case_of(row): row["date"] for row in rows}
    newest = {
        (case_of(row), row["kernel"]): row for row in rows if row["date"] == last[case_of(row)]
    }
    heads = [" ".join(case) for case in last]
    lines = [f"| seconds of a step | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for kind in [*(kind for kind, _ in GROUPS), "all else"]:
        found = [newest.get((case, kind)) for case in last]
        cells = [
            f"{float(r['seconds']):.2f} ({float(r['share']):.0%})" if r else "–" for r in found
        ]
        if any(found):
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def case_of(row: dict[str, str]) -> tuple[str, str, str]:
    return row["tuning"], row["term"], row["contender"]


if __name__ == "__main__":
    app()
