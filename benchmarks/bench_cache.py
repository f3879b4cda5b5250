"""What a teacher cache costs and what it gets wrong, for a real teacher and student.

`accuracy TEACHER STUDENT ROWS`: value and gradient (in the student's logits) of forward KL from
kept answers against the exact ones, on the reasoning of some GSM8K problems; rows are appended to
results/cache_accuracy.csv. `steps RECIPE`: training steps live and from each kind of cache, in a
process each; rows are appended to results/cache_steps.csv. `table`: rewrites both tables of
README.md. Run as `python -m benchmarks.bench_cache`.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machines import facts, versions
from benchmarks.tables import append_rows, read_rows, rewrite_section
from mlx_distill import objective as definition
from mlx_distill.backends import choose_backend
from mlx_distill.data.reading import read_examples
from mlx_distill.data.sequences import Segment, render
from mlx_distill.divergences import kl, log_softmax
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.objective import Objective
from mlx_distill.recipe.tables import DataTable
from mlx_distill.teaching.fill import whole_batch

KEPT = (1, 4, 8, 16, 32, 64, 128, 256)
DRAWS = (4, 12, 25, 50, 100)
SEEDS = 32
KINDS = ("off", "top_k", "sampled", "hidden")
SOURCES = ("mlx_distill/objective.py", "mlx_distill/teaching", "mlx_distill/backends")
app = typer.Typer(add_completion=False)


@app.command()
def accuracy(
    teacher: Path, student: Path, rows: Path, problems: int = 8, backend: str = "torch"
) -> None:
    """Errors by K and by draws: means over the reasoning's tokens."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    tokens = 0
    for z, t in _logits(teacher, student, rows, problems, backend):
        tokens += len(z)
        for key, row in _errors(z, t, tokens).items():
            found.setdefault(key, []).append(row)
    for (kind, size), parts in found.items():
        value, estimate, slope, variance, squares, distinct = np.concatenate(parts).mean(0)
        _append(
            "cache_accuracy",
            {
                **facts(*SOURCES),
                "teacher": teacher.parent.name,
                "student": student.parent.name,
                "tokens": tokens,
                "kind": kind,
                "size": size,
                "kl": value,
                "bias": (estimate - value) / value,
                "slope_error": np.sqrt(slope / squares),
                "slope_noise": np.sqrt(variance / squares),
                "distinct": distinct,
                "bytes": _bytes(kind, size, distinct),
            },
        )


def _logits(
    teacher: Path, student: Path, rows: Path, problems: int, backend: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float64 logits [N, V] of student and teacher at the reasoning of each problem."""
    chosen, tokenizer = choose_backend(backend), load_tokenizer(student)
    models = [chosen.load_teacher(folder, str(folder)) for folder in (student, teacher)]
    vocabulary = min(model.vocabulary_rows for model in models)
    examples = read_examples(DataTable(source=str(rows), format="gsm8k"), 0, Counter())
    for _, example in zip(range(problems), examples, strict=False):
        sequence = render(example, tokenizer)
        here = np.flatnonzero(sequence.segments() == Segment.COT) - 1
        both = []
        for model in models:
            ids, log_probs, _ = model.top_k(whole_batch([sequence], 1), vocabulary, vocabulary)
            dense = np.empty(log_probs.shape)
            np.put_along_axis(dense, ids.astype(np.int64), log_probs.astype(np.float64), 1)
            both.append(dense[here])
        yield both[0], both[1]


def _errors(z: np.ndarray, t: np.ndarray, seed: int) -> dict[tuple[str, int], np.ndarray]:
    """(kind, K or S) → [N, 6]: exact value, estimate, squared error of the (mean) slope, of one
    draw, squared slope, ids.
    """
    u, v = log_softmax(z), log_softmax(t)
    value, slope = kl(v, u), np.exp(u) - np.exp(v)
    squares = (slope**2).sum(1)
    order, found, objective = np.argsort(-v, axis=1), {}, Objective()
    zeros = np.zeros(len(z))
    for k in KEPT:
        ids = order[:, :k]
        kept = np.take_along_axis(v, ids, 1).astype(np.float16).astype(np.float64)
        tail = np.log(np.exp(np.take_along_axis(v, order[:, k:], 1)).sum(1))
        estimate = definition.coarse_divergence(z, ids, kept, tail, objective)
        error = (
            (definition.coarse_divergence_grad(z, ids, kept, tail, objective) - slope) ** 2
        ).sum(1)
        found["top_k", k] = np.stack([value, estimate, error, zeros, squares, zeros + k], 1)
        chosen = log_softmax(kept)  # what many programs do: both renormalised to the K ids
        mine = log_softmax(np.take_along_axis(z, ids, 1))
        part = np.zeros_like(slope)
        np.put_along_axis(part, ids, np.exp(mine) - np.exp(chosen), 1)
        error = ((part - slope) ** 2).sum(1)
        found["renormalised", k] = np.stack(
            [value, kl(chosen, mine), error, zeros, squares, zeros + k], 1
        )
    cumulated = np.exp(v).cumsum(1)
    entropy = -(np.exp(v) * v).sum(1)
    for kind in ("sampled", "independent draws"):
        for draws in DRAWS:
            found[kind, draws] = _drawn(
                kind, draws, u, v, cumulated, entropy, np.stack([value, squares], 1), seed
            )
    return found


def _drawn(
    kind: str,
    draws: int,
    u: np.ndarray,
    v: np.ndarray,
    cumulated: np.ndarray,
    entropy: np.ndarray,
    exact: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Over `SEEDS` draws of S: [N, 6] as `_errors`."""
    random, rows = np.random.default_rng([seed, draws]), []
    for row in range(len(u)):
        values, errors, distinct, mean = [], [], [], np.zeros(u.shape[1])
        t = np.exp(v[row])
        for _ in range(SEEDS):
            uniform = random.random(draws)
            uniform = (np.arange(draws) + uniform) / draws if kind == "sampled" else uniform
            ids, counts = np.unique(
                np.searchsorted(cumulated[row], uniform * cumulated[row, -1], side="right"),
                return_counts=True,
            )
            share = counts / draws
            values.append(-(share * u[row, ids]).sum() - entropy[row])
            errors.append((t * t).sum() + (share * share - 2 * share * t[ids]).sum())
            distinct.append(len(ids))
            mean[ids] += share / SEEDS
        rows.append(
            [
                exact[row, 0],
                np.mean(values),
                ((mean - t) ** 2).sum(),
                np.mean(errors),
                exact[row, 1],
                np.mean(distinct),
            ]
        )
    return np.array(rows)


def _bytes(kind: str, size: int, distinct: float) -> float:
    """A token on disk, its id of 4 bytes included."""
    return 8 + 6 * size if kind in ("top_k", "renormalised") else 14 + 6 * distinct


@app.command()
def steps(
    recipe: Path,
    backend: str = "torch",
    count: int = 4,
    set_: Annotated[list[str] | None, typer.Option("--set", help="As for mlx-distill.")] = None,
) -> None:
    """Seconds and peak memory of a step, live and cached; the first step of each run does not
    count.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            kept = [] if kind == "off" else [f"teacher.cache_folder={scratch}"]
            settings = [
                *(set_ or ()),
                f"optim.steps={count + 1}",
                "eval.task=",
                "run.validate_every=0",
                "run.checkpoint_every=0",
                f"run.folder={scratch}",
                f"run.name={kind}",
                f"teacher.cache={kind}",
                *kept,
            ]
            words = [
                "--backend",
                backend,
                *(word for setting in settings for word in ("--set", setting)),
            ]
            for command in ("teach", "run") if kind != "off" else ("run",):
                subprocess.run(
                    [sys.executable, "-m", "mlx_distill", command, str(recipe), *words], check=True
                )
            rows = [
                json.loads(line)
                for line in (Path(scratch) / kind / "metrics.jsonl").read_text().splitlines()
            ][1:]
            cache = [folder for folder in Path(scratch).glob(f"{kind}-*") if kind != "off"]
            _append(
                "cache_steps",
                {
                    **facts(*SOURCES),
                    **versions("mlx", "torch"),
                    "recipe": recipe.stem,
                    "backend": backend,
                    "kind": kind,
                    "seconds": median(row["seconds"] for row in rows),
                    "peak_bytes": max(row["peak_bytes"] for row in rows),
                    "flops": median(sum(row["flops"].values()) for row in rows),
                    "loss_tokens": rows[0]["loss_tokens"],
                    **_size(cache),
                },
            )


def _append(name: str, row: dict) -> None:
    append_rows(name, [row])
    print(
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        ),
        flush=True,
    )


def _size(cache: list[Path]) -> dict[str, float]:
    """Tokens and their bytes; the head, kept once, does not count."""
    if not cache:
        return {"cache_bytes": 0, "cache_tokens": 0}
    examples = [
        row
        for index in cache[0].glob("part-*/index.json")
        for row in json.loads(index.read_text())["examples"]
    ]
    tokens = sum(stop - start for _, start, stop, _ in examples)
    return {
        "cache_bytes": sum(file.stat().st_size for file in cache[0].glob("part-*/*.npy")),
        "cache_tokens": tokens,
    }


@app.command()
def table() -> None:
    """Rewrite the sections `cache_accuracy` and `cache_steps` of README.md from the newest rows."""
    rows = _newest(read_rows("cache_accuracy"), "kind", "size")
    first = rows[0]
    lines = [
        f"{first['teacher']} teaches {first['student']}: {rows[-1]['tokens']} tokens of "
        f"reasoning, exact KL {float(first['kl']):.4f} nats; "
        f"draws repeated {SEEDS} times; commit {first['commit']}.",
        "",
        "| kept | K or S | ids a token | bytes a token | bias of the loss | error of the mean "
        "gradient | noise of one gradient |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        bias, error, noise = (float(row[name]) for name in ("bias", "slope_error", "slope_noise"))
        kept = (
            f"{row['kind']} | {row['size']} | {float(row['distinct']):.1f} | "
            f"{float(row['bytes']):.0f}"
        )
        lines.append(f"| {kept} | {bias:+.2%} | {error:.2%} | {f'{noise:.1%}' if noise else '–'} |")
    rewrite_section("cache_accuracy", "\n".join(lines))
    lines = [
        "| recipe | backend | teacher | a step | peak memory | GFLOP a step | bytes a token on "
        "disk |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in _newest(read_rows("cache_steps"), "recipe", "backend", "kind"):
        size = float(row["cache_bytes"]) / max(1.0, float(row["cache_tokens"]))
        seconds, peak, flops = (float(row[name]) for name in ("seconds", "peak_bytes", "flops"))
        numbers = f"{seconds:.2f} s | {peak / 1e6:,.0f} MB | {flops / 1e9:,.0f} | {size:,.0f}"
        kind = "live" if row["kind"] == "off" else f"`{row['kind']}`"
        lines.append(f"| {row['recipe']} | {row['backend']} | {kind} | {numbers} |")
    rewrite_section("cache_steps", "\n".join(lines))


def _newest(rows: list[dict[str, str]], *names: str) -> list[dict[str, str]]:
    """The last row of each combination."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


if __name__ == "__main__":
    app()
