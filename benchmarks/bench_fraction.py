"""The paper's efficiency claim: time, peak memory and operations of a whole training step at
fractions of the sequence.

    python benchmarks/bench_fraction.py run --model models/SmolLM2-135M-Instruct           measure
    ours on the CPU python benchmarks/bench_fraction.py run --shape qwen3-4b --teacher-shape
    qwen3-8b --device cuda --dtype bfloat16 \\
        --batch 1 --tokens 4096 --rounds 1 --repetitions 5
    python benchmarks/bench_fraction.py table                                              rewrite
    table and figure only

A step is the one of bench_step.py (teacher forward, student forward, loss, backward, clipping,
AdamW) on the first `fraction` of every sequence; prompts keep their length, all that follows is
supervised. Each fraction is a fresh process in each round. Rows are appended to
results/bench_fraction.csv; table and figure (fraction.svg) show the last comparison that was
measured, and beside it the operations that mlx_distill/cost/flops.py counts for the Qwen3 pairs of
the paper.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_step, models_torch, workers
from benchmarks.bench_step import Case, ChunkTokens, Model, Shape, TeacherModel
from benchmarks.tables import README, append_rows, read_rows, rewrite_section
from mlx_distill.cost.flops import step_flops

FILE, FIGURE = "bench_fraction", "fraction.svg"
FRACTIONS = [round(0.1 * tenth, 1) for tenth in range(1, 11)]
PAIRS = (("qwen3-8b", "qwen3-0.6b"), ("qwen3-8b", "qwen3-4b"))  # teacher, student
PAIR_TOKENS = 4096
Row = dict[str, str]
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Model = bench_step.NOWHERE,
    shape: Shape = "",
    teacher_model: TeacherModel = "",
    teacher_shape: Shape = "",
    batch: int = 2,
    tokens: Annotated[int, typer.Option(help="of a whole sequence")] = 512,
    supervised_share: Annotated[
        float, typer.Option(help="of a whole sequence; what comes before is the prompt")
    ] = 0.95,
    fraction: Annotated[list[float], typer.Option()] = FRACTIONS,
    kd_weight: float = 0.5,
    chunk_tokens: ChunkTokens = 0,
    device: str = "cpu",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    contender: str = "ours",
    rounds: int = 3,
    repetitions: int = 1,
    threads: int = 0,
    scratch: str = "",
    keep: Annotated[bool, typer.Option(help="append the rows, rewrite table and figure")] = True,
) -> None:
    """Measure each fraction, keep the rows, rewrite table and figure."""
    whole = bench_step.make_case(
        model,
        shape,
        teacher_model,
        teacher_shape,
        batch,
        tokens,
        supervised_share,
        kd_weight,
        chunk_tokens,
        device,
        dtype,
        gradient_checkpointing,
    )
    if round(min(fraction) * tokens) <= whole.prompt_tokens:
        raise SystemExit(
            f"{min(fraction)} of {tokens} tokens ends inside the prompt of {whole.prompt_tokens}: "
            "raise --supervised-share"
        )
    with tempfile.TemporaryDirectory() as temporary:
        rows, stopped = measure(
            bench_step.with_folders(whole, Path(scratch or temporary)),
            contender,
            fraction,
            rounds,
            repetitions,
            threads,
        )
    if keep and rows:
        append_rows(FILE, rows)
        table()
    if stopped:
        raise SystemExit(130)


@app.command()
def table() -> None:
    """Rewrite the README's table and the figure from the last rows kept."""
    rows = read_rows(FILE)
    last = [row for row in rows if row["date"] == rows[-1]["date"]]
    rewrite_section("fraction", render(last))
    draw(last, README.parent / FIGURE)


def measure(
    case: Case, contender: str, fractions: list[float], rounds: int, repetitions: int, threads: int
) -> tuple[list[dict[str, object]], bool]:
    """One row a fraction, and whether it was stopped by Ctrl-C, as `bench_step.measure` has it."""
    cases = {f: replace(case, tokens=round(f * case.tokens)) for f in fractions}
    found, stopped = workers.in_rounds(
        cases,
        rounds,
        lambda f, into: bench_step.attempt(cases[f], contender, repetitions, threads, into),
    )
    facts = {**bench_step.facts_of(), **bench_step.place_of(found.values(), threads)}
    rows = []
    for f, numbers in found.items():
        row = bench_step.row_of(cases[f], contender, numbers)
        rows.append(
            {
                **facts,
                **row,
                "fraction": f,
                "whole_tokens": case.tokens,
                "prompt_tokens": case.prompt_tokens,
            }
        )
        shown = ("fraction", "tokens", "seconds_median", "cpu_seconds_min", "peak_bytes", "flops")
        print({key: rows[-1][key] for key in shown}, flush=True)
    return rows, stopped


def pair_flops(teacher: str, student: str, fraction: float, prompt_share: float) -> float:
    """Operations of a step on one sequence of `PAIR_TOKENS`, cut to the fraction; the prompt is the
    same share of the whole.
    """
    tokens, prompt = round(fraction * PAIR_TOKENS), round(prompt_share * PAIR_TOKENS)
    shapes = {name: models_torch.shape_of(models_torch.SHAPES[name]) for name in (teacher, student)}
    step = models_torch.make_step(shapes[student].vocabulary, 1, tokens, prompt)
    return sum(step_flops(step, shapes[teacher], shapes[student], full=True).values())


def render(rows: list[Row]) -> str:
    last, whole, share = rows[-1], whole_row(rows), prompt_share(rows)
    pairs = [
        {f: pair_flops(*pair, f, share) for f in {1.0, *map(fraction_of, rows)}} for pair in PAIRS
    ]
    place = (
        last["device_name"]
        if last["device"] == "cuda"
        else f"{last['cpu']}, {last['threads']} thread(s), load {last['load']}"
    )
    lines = [
        f"**{last['model']}**, teacher: {last['teacher']}; {last['batch']} × "
        f"{last['whole_tokens']} tokens when whole, prompts of {last['prompt_tokens']}, "
        f"{last['contender']}, {last['dtype']}; {place}, torch {last['torch']}, "
        f"{last['date'][:10]}, commit {last['commit']}. A whole step: median seconds on the clock "
        "(least CPU seconds), peak over what was held before it (weights, optimizer: "
        f"{int(last['held_bytes'] or 0) / 1e6:,.0f} MB), operations; × is relative to whole "
        "sequences. The last columns are computed: operations of a step on one sequence of "
        f"{PAIR_TOKENS:,} tokens, prompts of {share:.1%}.",
        "",
        "| fraction | tokens | seconds | × | CPU × | peak | × | held and peak × | TFLOP | × | "
        + " | ".join(f"{teacher} → {student}, TFLOP | ×" for teacher, student in PAIRS)
        + " |",
        f"|---:|---:|{'---:|' * (8 + 2 * len(PAIRS))}",
    ]
    for row in rows:
        f = fraction_of(row)
        cells = [
            f"{f:g}",
            row["tokens"],
            *measured_cells(row, whole),
            f"{float(row['flops']) / 1e12:.2f}",
            times(row, whole, "flops"),
        ]
        cells += [
            cell
            for pair in pairs
            for cell in (f"{pair[f] / 1e12:.0f}", f"{pair[f] / pair[1.0]:.2f}")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![time, memory and operations over the fraction]({FIGURE})"])


def measured_cells(row: Row, whole: Row | None) -> list[str]:
    if not row["seconds_median"]:
        return ["does not fit or fails", *["–"] * 5]
    return [
        f"{float(row['seconds_median']):.2f} ({float(row['cpu_seconds_min']):.2f})",
        times(row, whole, "seconds_median"),
        times(row, whole, "cpu_seconds_min"),
        f"{int(row['peak_bytes']) / 1e6:,.0f} MB",
        times(row, whole, "peak_bytes"),
        times(row, whole, "held_bytes", "peak_bytes"),
    ]


def times(row: Row, whole: Row | None, *columns: str) -> str:
    """The sum of columns relative to the whole sequences' row."""
    value = relative(row, whole, *columns)
    return "–" if value is None else f"{value:.2f}"


def relative(row: Row, whole: Row | None, *columns: str) -> float | None:
    if whole is None or not all(r[c] for r in (row, whole) for c in columns):
        return None
    return sum(float(row[c]) for c in columns) / sum(float(whole[c]) for c in columns)


def fraction_of(row: Row) -> float:
    return float(row["fraction"])


def whole_row(rows: list[Row]) -> Row | None:
    return next((row for row in rows if fraction_of(row) == 1.0), None)


def prompt_share(rows: list[Row]) -> float:
    return int(rows[-1]["prompt_tokens"]) / int(rows[-1]["whole_tokens"])


def draw(rows: list[Row], path: Path) -> None:
    """Two panels: what was measured here, and the operations of the paper's pairs, all relative to
    whole sequences.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mlx-distill"  # the same rows give the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    whole, fractions = whole_row(rows), [fraction_of(row) for row in rows]
    columns = {
        "time": ("seconds_median",),
        "peak memory over weights and optimizer": ("peak_bytes",),
        "all memory": ("held_bytes", "peak_bytes"),
        "operations": ("flops",),
    }
    for (label, names), marker in zip(columns.items(), "os^x", strict=True):
        points = [(f, relative(row, whole, *names)) for f, row in zip(fractions, rows, strict=True)]
        left.plot(
            *zip(*((f, y) for f, y in points if y is not None), strict=True) if whole else ([], []),
            marker=marker,
            label=label,
        )
    left.set_title(f"measured: {rows[-1]['model']}, {rows[-1]['whole_tokens']} tokens", fontsize=10)
    for (teacher, student), marker in zip(PAIRS, "os", strict=True):
        flops = [pair_flops(teacher, student, f, prompt_share(rows)) for f in FRACTIONS]
        right.plot(
            FRACTIONS,
            [value / flops[-1] for value in flops],
            marker=marker,
            label=f"operations, {teacher} → {student}",
        )
    right.set_title(f"computed: {PAIR_TOKENS:,} tokens", fontsize=10)
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="fraction of the sequence", xlim=(0, 1.05), ylim=(0, 1.05))
        axes.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
        )
    left.set_ylabel("relative to whole sequences")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    app()
