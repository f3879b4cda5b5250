"""One real model on mathematics, by both backends: right answers, texts, and the NLL of worked
solutions.

    python benchmarks/prepare_smollm2.py models
    python benchmarks/maths_rows.py data/maths --gsm8k FILE
    python benchmarks/maths.py run mlx && python benchmarks/maths.py run torch
    python benchmarks/maths.py write                the section of benchmarks/README.md

In: a model folder and the rows of `maths_rows.py`. Out: a row of `results/maths.csv` for each
problem and backend: whether the greedy text is right and finished, its digest, and what the model
gives to the tokens of the worked solution. Decided here: that the answer is looked for anywhere in
the text, for this model does not think in tags, and that everything is float32. A run that was
stopped goes on: generations are kept as `mlx-distill eval` keeps them.
"""

import csv
import sys
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.machines import facts, versions  # noqa: E402
from benchmarks.tables import RESULTS, read_rows, rewrite_section  # noqa: E402
from mlx_distill.backends import choose_backend  # noqa: E402
from mlx_distill.data.batches import validation_batches  # noqa: E402
from mlx_distill.data.reading import read_examples  # noqa: E402
from mlx_distill.data.sequences import render  # noqa: E402
from mlx_distill.models.hub import load_tokenizer  # noqa: E402
from mlx_distill.objective import Objective  # noqa: E402
from mlx_distill.recipe.recipe import Recipe  # noqa: E402
from mlx_distill.reporting.markdown import pipe_table  # noqa: E402
from mlx_distill.scoring.generations import first_texts  # noqa: E402
from mlx_distill.scoring.intervals import interval, paired  # noqa: E402
from mlx_distill.scoring.of_model import score_model  # noqa: E402
from mlx_distill.view import View  # noqa: E402
from mlx_distill.words import percent, points  # noqa: E402

NAME = "maths"
TASKS = {"gsm8k": "gsm8k", "chain_sum": "jsonl"}  # a file's name → the task that reads it
SETTINGS = ("examples=100", "max_new_tokens=256", "batch_size=20", "answer=anywhere")
BOTH = ("mlx", "torch")
SAID = {"gsm8k": "GSM8K", "chain_sum": "chain_sum of reasoning-gym"}
Rows = list[dict[str, str]]
app = typer.Typer(add_completion=False)


@app.command()
def run(
    backend: Annotated[str, typer.Argument(help="mlx or torch")],
    model: Annotated[Path, typer.Option()] = Path("models/SmolLM2-135M-Instruct"),
    data: Annotated[Path, typer.Option()] = Path("data/maths"),
    out: Annotated[Path, typer.Option(help="where generations are kept")] = Path("runs/maths"),
) -> None:
    """Ask both sets of one backend, and keep its rows in place of its earlier ones."""
    rows = []
    for name, kind in TASKS.items():
        file, kept = data / f"{name}.jsonl", out / backend / name
        with View(Console()) as view:
            score = score_model(str(model), f"{kind}:{file}", SETTINGS, view, backend, kept)
        texts = first_texts(next(kept.glob("*.jsonl")))[str(model)]
        golds = solution_costs(model, file, kind, backend)
        for problem in score.correct:
            text = texts[problem]
            cost, tokens = golds[text.prompt]
            rows.append(
                facts("mlx_distill", "benchmarks/maths.py")
                | versions("mlx", "torch")
                | {"model": model.name, "task": name, "backend": backend, "problem": problem}
                | {"right": int(text.correct), "finished": int(text.finished)}
                | {"tokens": text.tokens, "text": sha256(text.text.encode()).hexdigest()[:12]}
                | {"solution_nll": f"{cost:.6f}", "solution_tokens": tokens}
            )
    keep(rows, backend)


def solution_costs(
    model: Path, file: Path, kind: str, backend: str
) -> dict[str, tuple[float, int]]:
    """Prompt → the NLL of its worked solution and answer in nats, summed over how many tokens."""
    format_ = "gsm8k" if kind == "gsm8k" else "columns"
    recipe = Recipe.model_validate(
        {
            "teacher": {"model": str(model)},
            "student": {"model": str(model), "compute_dtype": "float32"},
            "data": {"source": str(file), "format": format_},
            "objective": {"kd_weight": 0.0},
            "batch": {"micro_batch_size": 1},
        }
    )
    tokenizer = load_tokenizer(model)
    student = choose_backend(backend).load_student(model, str(model), recipe)
    found = {}
    for example in read_examples(recipe.data):
        (batch,) = validation_batches([render(example, tokenizer)], recipe.batch)
        sums = student.score(batch, None, Objective.from_table(recipe.objective))
        cost, tokens = sums.terms["ce"][1:].sum(), sums.tokens[1:].sum()  # without the prompt
        found[example.prompt] = float(cost), int(tokens)
    return found


def keep(rows: list[dict[str, object]], backend: str) -> None:
    """Write these rows in place of those of their backend."""
    path = RESULTS / f"{NAME}.csv"
    others = [row for row in read_rows(NAME) if row["backend"] != backend] if path.exists() else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *rows])


@app.command()
def write() -> None:
    """The section of benchmarks/README.md, from the kept rows."""
    rows = read_rows(NAME)
    head = [
        "problems",
        "backend",
        "right",
        "finished",
        "tokens a text",
        "NLL a token of the solutions",
    ]
    lines, said = [], []
    for task in TASKS:
        of = {backend: _of(rows, task, backend) for backend in BOTH}
        lines += [[SAID[task], backend, *_cells(list(of[backend].values()))] for backend in BOTH]
        said.append(_between(task, *of.values()))
    one = rows[0]
    about = (
        f"{one['model']}, float32, greedy, at most 256 new tokens, {one['cpu']}, MLX {one['mlx']}, "
        f"torch {one['torch']}; commit {', '.join(sorted({row['commit'] for row in rows}))}."
    )
    body = pipe_table(head, lines, "llrrrr").replace("\u00a0", " ")
    rewrite_section(NAME, "\n".join([about, "", body, "", *said]))


def _of(rows: Rows, task: str, backend: str) -> dict[str, dict[str, str]]:
    return {row["problem"]: row for row in rows if (row["task"], row["backend"]) == (task, backend)}


def _cells(rows: Rows) -> list[str]:
    right = [[float(row["right"])] for row in rows]
    low, high = interval(right)
    return [
        f"{percent(fmean(one for (one,) in right))} ({percent(low)} to {percent(high)})",
        percent(fmean(float(row["finished"]) for row in rows)),
        f"{fmean(float(row['tokens']) for row in rows):.0f}",
        f"{_nll(rows):.5f}",
    ]


def _nll(rows: Rows) -> float:
    cost, tokens = (
        sum(float(row[f"solution_{name}"]) for row in rows) for name in ("nll", "tokens")
    )
    return cost / tokens


def _between(task: str, a: dict[str, dict[str, str]], b: dict[str, dict[str, str]]) -> str:
    """MLX less torch, on the problems that both were asked."""
    shared = [key for key in a if key in b]
    gap = paired([float(a[key]["right"]) - float(b[key]["right"]) for key in shared])
    same = sum(a[key]["text"] == b[key]["text"] for key in shared)
    apart = max(
        abs(float(a[key]["solution_nll"]) - float(b[key]["solution_nll"]))
        / float(a[key]["solution_tokens"])
        for key in shared
    )
    whole = abs(_nll(list(a.values())) - _nll(list(b.values())))
    return (
        f"- {SAID[task]}: MLX less torch {points(gap.mean)} points ({points(gap.low)} to "
        f"{points(gap.high)}, paired over {len(shared)} problems); {same} of {len(shared)} texts are "
        f"the same to the letter; the NLL a token differs by {whole:.1e}, in no solution by more "
        f"than {apart:.1e}."
    )


if __name__ == "__main__":
    app()
