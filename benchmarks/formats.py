"""What a base in few bits costs before anything learns on it: one real model, rounded in each format.

    python benchmarks/prepare_smollm2.py models
    python benchmarks/maths_rows.py data/maths --gsm8k FILE
    python benchmarks/formats.py run
    python benchmarks/formats.py write              the section of benchmarks/README.md

In: a model folder and a hundred rows of GSM8K. Out: a row of `results/formats.csv` for each problem
and format: what the rounded model gives to the tokens of the worked solution, and how far it is from
the model as it is stored. Decided here: each is a student that begins to learn adapters, which change
nothing yet, on torch, which has all formats; all compute in float32.
"""

import csv
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.machines import facts, versions  # noqa: E402
from benchmarks.tables import RESULTS, read_rows, rewrite_section  # noqa: E402
from mlx_distill.backends import choose_backend  # noqa: E402
from mlx_distill.cost.dense import Dense, frozen_bytes  # noqa: E402
from mlx_distill.data.batches import validation_batches  # noqa: E402
from mlx_distill.data.reading import read_examples  # noqa: E402
from mlx_distill.data.sequences import render  # noqa: E402
from mlx_distill.models.folder import read_config  # noqa: E402
from mlx_distill.models.hub import load_tokenizer  # noqa: E402
from mlx_distill.objective import Objective  # noqa: E402
from mlx_distill.recipe.recipe import Recipe, with_values  # noqa: E402
from mlx_distill.reporting.markdown import pipe_table  # noqa: E402
from mlx_distill.words import DASH, amount, number  # noqa: E402

NAME = "formats"
FORMATS: dict[str, int | str] = {
    "as stored": 0,
    "MLX's 8 bits": 8,
    "MLX's 6 bits": 6,
    "MLX's 4 bits": 4,
    "NF4": "nf4",
}
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[Path, typer.Option()] = Path("models/SmolLM2-135M-Instruct"),
    rows: Annotated[Path, typer.Option()] = Path("data/maths/gsm8k.jsonl"),
) -> None:
    """Ask every format about every solution, and keep the rows."""
    recipe, backend = _recipe(model, rows), choose_backend("torch")
    tokenizer, objective = load_tokenizer(model), Objective.from_table(recipe.objective)
    teacher = backend.load_teacher(model, str(model), 0, "float32")
    students = {
        name: backend.load_student(
            model, str(model), with_values(recipe, student={"quantize_bits": bits})
        )
        for name, bits in FORMATS.items()
    }
    dense, kept = Dense.of(read_config(model), str(model)), []
    for index, example in enumerate(read_examples(recipe.data)):
        (batch,) = validation_batches([render(example, tokenizer)], recipe.batch)
        targets = teacher.targets(batch)
        for name, student in students.items():
            sums = student.score(batch, targets, objective)
            found = {key: sums.terms[key][1:].sum() for key in ("ce", "kd", "agree")}
            kept.append(
                facts("mlx_distill", "benchmarks/formats.py")
                | versions("torch", "bitsandbytes")
                | {"model": model.name, "format": name, "problem": index}
                | {"tokens": int(sums.tokens[1:].sum()), "nll": f"{found['ce']:.6f}"}
                | {"kl": f"{found['kd']:.6f}", "agree": f"{found['agree']:.0f}"}
                | {"bytes_in_bfloat16": int(frozen_bytes(dense, FORMATS[name], 2))}
            )
        print(f"{index + 1} problems", file=sys.stderr)
    with (RESULTS / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def _recipe(model: Path, rows: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(model)},
            "student": {"model": str(model), "compute_dtype": "float32", "tuning": "lora"},
            "data": {"source": str(rows), "format": "gsm8k"},
            "objective": {"kd_weight": 0.5, "segments": ["cot", "answer"]},
            "batch": {"micro_batch_size": 1},
        }
    )


@app.command()
def write() -> None:
    """The section of benchmarks/README.md, from the kept rows."""
    rows = read_rows(NAME)
    of = {name: [row for row in rows if row["format"] == name] for name in FORMATS}
    plain = [_a_token(row) for row in of["as stored"]]
    lines = []
    for name, those in of.items():
        tokens = sum(int(row["tokens"]) for row in those)
        nll, kl, agree = (sum(float(row[key]) for row in those) for key in ("nll", "kl", "agree"))
        more = [_a_token(row) - base for row, base in zip(those, plain, strict=True)]
        lines.append(
            [
                name,
                amount(float(those[0]["bytes_in_bfloat16"]), "B"),
                f"{nll / tokens:.4f}",
                DASH if name == "as stored" else _with_interval(more),
                number(max(kl / tokens, 0.0)) if name != "as stored" else DASH,
                f"{100 * agree / tokens:.1f} %",
            ]
        )
    one = rows[0]
    said = (
        f"{one['model']}, {len(plain)} solutions of {fmean(int(r['tokens']) for r in of['NF4']):.0f} "
        f"tokens; {one['cpu']}, torch {one['torch']}, bitsandbytes {one['bitsandbytes']}; commit "
        f"{one['commit']}."
    )
    head = ["format", "bytes", "NLL a token", "more than as stored", "KL", "same first choice"]
    body = pipe_table(head, lines, "lrrrrr").replace("\u00a0", " ")
    rewrite_section(NAME, f"{said}\n\n{body}")


def _with_interval(differences: list[float]) -> str:
    """Their mean and Student's interval over problems."""
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    found = (f"{value:+.4f}".replace("-", "−") for value in (fmean(differences), low, high))
    return "{} ({} to {})".format(*found)


def _a_token(row: dict[str, str]) -> float:
    return float(row["nll"]) / float(row["tokens"])


if __name__ == "__main__":
    app()
