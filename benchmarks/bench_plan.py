"""What `plan` estimates against what its probe measures: peak memory of recipes that differ in what
decides it.

    python benchmarks/bench_plan.py run      measure, append to results/bench_probe.csv, rewrite
                                             the README's table
    python benchmarks/bench_plan.py table    rewrite the table only

The ten recipes of a backend have models with random weights; a recipe of this repository can be
named by its path. The probe is the program's own (`mlx_distill/cost/probe.py`): one step of the
costliest micro-batch, then a batch of validation, in a fresh process.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from benchmarks.machines import blas_name, facts, installed  # noqa: E402
from benchmarks.tables import append_rows, read_rows, rewrite_section  # noqa: E402

MEASURED = ("mlx_distill/cost", "mlx_distill/backends")
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # a machine's own choice is measured
    os.environ.pop(name, None)

STUDENT = {
    "layers": 8,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 768,
    "vocabulary": 8192,
    "tied": True,
    "family": "llama",
}
TEACHER = STUDENT | {"layers": 4, "width": 384, "ffn": 1024, "heads": 6, "kv_heads": 2}
# name → (student's shape, teacher's shape or None, tokens of the longest example, settings); the
# rest is as in STUDENT and RECIPE
RECIPES: dict[str, tuple[dict, dict | None, int, tuple[str, ...]]] = {
    "full": ({}, {}, 256, ()),
    "full, micro-batch 8": ({}, {}, 256, ("batch.micro_batch_size=8",)),
    "full, long": ({}, {}, 768, ("batch.micro_batch_size=1", "batch.global_batch_size=2")),
    "full, checkpointing": (
        {"layers": 16},
        {},
        256,
        ("student.gradient_checkpointing=true", "batch.micro_batch_size=4"),
    ),
    "full, untied Qwen3 of 49k ids": (
        {"vocabulary": 49152, "tied": False, "family": "qwen3"},
        {"vocabulary": 49152},
        256,
        (),
    ),
    "full, no teacher, Lion": (
        {"width": 384, "heads": 6, "ffn": 1024},
        None,
        128,
        ("optim.optimizer=lion", "objective.kd_weight=0.0"),
    ),
    "LoRA, frozen head": (
        {"width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocabulary": 16384},
        {"vocabulary": 16384},
        256,
        (
            "student.tuning=lora",
            "student.rank=8",
            "student.alpha=16.0",
        ),
    ),
    "DoRA": (
        {"width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536},
        {},
        512,
        ("student.tuning=dora", "student.rank=8", "student.alpha=16.0"),
    ),
    "LoRA on 4 blocks, long": (
        {"layers": 12},
        {},
        512,
        ("student.tuning=lora", "student.rank=8", "student.alpha=16.0", "student.lora_layers=4"),
    ),
    "LoRA, checkpointing": (
        {"layers": 16, "width": 384, "heads": 6, "ffn": 1024},
        {},
        384,
        (
            "student.tuning=lora",
            "student.rank=8",
            "student.alpha=16.0",
            "student.gradient_checkpointing=true",
        ),
    ),
    "half a trace, 4-bit teacher": (
        {"layers": 12},
        {"width": 512, "heads": 8, "ffn": 1536},
        512,
        ("teacher.quantize_bits=4", "truncation.fraction=0.5", "objective.temperature=2.0"),
    ),
    "full, no teacher": (
        {"width": 384, "heads": 6, "ffn": 1024},
        None,
        128,
        ("objective.kd_weight=0.0",),
    ),
    "half a trace": (
        {"layers": 12},
        {"width": 512, "heads": 8, "ffn": 1536},
        512,
        ("truncation.fraction=0.5", "objective.temperature=2.0"),
    ),
}
# on torch, which has no Lion and quantises on CUDA alone
INSTEAD = {
    "full, no teacher, Lion": "full, no teacher",
    "half a trace, 4-bit teacher": "half a trace",
}
RECIPE = """
[data]
source = "{root}/rows.jsonl"
validation_examples = 2
[batch]
micro_batch_size = 2
global_batch_size = 8
[optim]
steps = 1
[objective]
segments = ["cot"]
"""
app = typer.Typer(add_completion=False)


@app.command()
def run(
    backend: Annotated[str, typer.Option(help="mlx or torch")] = "mlx",
    recipe: Annotated[
        list[str] | None, typer.Option(help="names or paths; default: the backend's ten")
    ] = None,
) -> None:
    """Measure the recipes one after the other and keep the rows."""
    for name in recipe or names(backend):
        row = measure(backend, name)
        append_rows("bench_probe", [row])
        print(row, flush=True)
        table()


def names(backend: str) -> list[str]:
    """The recipes of a backend."""
    others = INSTEAD if backend == "torch" else INSTEAD.values()
    return [name for name in RECIPES if name not in others]


@app.command()
def table() -> None:
    """Rewrite the README's table from the kept rows: the newest row of each backend and recipe."""
    rewrite_section("plan", render(read_rows("bench_probe")))


def measure(backend: str, name: str) -> dict[str, object]:
    """One row: a recipe's estimate and what the probe measured, of training and of validation."""
    from mlx_distill.cost.probe import probe
    from mlx_distill.machine import this_machine
    from mlx_distill.recipe.load import load_recipe
    from mlx_distill.terminal.plan import plan_of

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # so that nothing kept answers
        recipe = (
            load_recipe(write_world(Path(folder), name), RECIPES[name][3])
            if name in RECIPES
            else load_recipe(Path(name))
        )
        machine = this_machine(backend)
        _, plan, question = plan_of(recipe, machine, weights=True)
        measured = probe(question)
    validation = [moment.total for moment in plan.moments if not moment.trains]
    return {
        **facts(*MEASURED),
        "backend": backend,
        "version": installed(backend),
        "blas": blas_name() if backend == "mlx" else "",
        "device": machine.device,
        "recipe": name if name in RECIPES else Path(name).stem,
        "moment": plan.training_peak.name,
        "estimated_training_bytes": round(plan.training_peak.total),
        "measured_training_bytes": round(measured.training_bytes),
        "estimated_validation_bytes": round(max(validation)),
        "measured_validation_bytes": round(measured.validation_bytes),
    }


def write_world(root: Path, name: str) -> Path:
    """Models with random weights, rows and `recipe.toml` in a folder."""
    student, teacher, tokens, _ = RECIPES[name]
    write_model(root / "student", STUDENT | student, 0)
    models = (
        f'[student]\nmodel = "{root}/student"\n[teacher]\nmodel = '
        f'"{"" if teacher is None else f"{root}/teacher"}"\n'
    )
    if teacher is not None:
        write_model(root / "teacher", TEACHER | teacher, 1)
    write_rows(root / "rows.jsonl", tokens)
    (root / "recipe.toml").write_text(models + RECIPE.format(root=root))
    return root / "recipe.toml"


def write_model(folder: Path, shape: dict, seed: int) -> None:
    from conftest import byte_tokenizer
    from safetensors.numpy import save_file
    from tiny import llama_config, random_weights

    config = llama_config(
        shape["layers"], shape["width"], shape["tied"], shape["vocabulary"], shape["family"]
    ) | {
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "intermediate_size": shape["ffn"],
        "head_dim": shape["width"] // shape["heads"],
    }
    byte_tokenizer("qwen2_5").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        random_weights(config, seed, 0.02), folder / "model.safetensors", metadata={"format": "pt"}
    )


def write_rows(path: Path, tokens: int, count: int = 18) -> None:
    """Examples of 60 % to 100 % of so many tokens (a byte is one; the template takes about 110), a
    tenth of it the answer.
    """
    rows = []
    for index in range(count):
        letters = int((tokens - 112) * (0.6 + 0.4 * (index + 1) / count))
        rows.append(
            {
                "prompt": f"{index:4}",
                "cot": "c" * (letters - letters // 10),
                "answer": "a" * (letters // 10),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def render(rows: list[dict[str, str]]) -> str:
    """A Markdown table of the newest row of each backend and recipe, and how far off the estimate
    is.
    """
    newest = {(row["backend"], row["recipe"]): row for row in rows}
    last = rows[-1]
    lines = [
        f"{last['cpu']}, {last['cores']} cores shared with other work, MLX "
        f"{version(rows, 'mlx')}, torch {version(rows, 'torch')}, Python {last['python']}, "
        f"{last['date'][:10]}, commit {last['commit']}. Peaks in MB, of a step and of a batch of "
        "validation: estimated from the configs, measured by the probe, and the estimate's error. "
        "The last column is the error of the larger of the two, which is what a plan says.",
        "",
        "| backend | recipe | moment | step | measured | error | validation | measured | error "
        "| error of the plan |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {backend} ({row['device']}) | {name} | {row['moment']} | {' | '.join(cells(row))} |"
        for (backend, name), row in sorted(newest.items(), key=lambda pair: pair[0][0])
    ]
    return "\n".join([*lines, "", *promises(newest)])


def version(rows: list[dict[str, str]], backend: str) -> str:
    return next((row["version"] for row in reversed(rows) if row["backend"] == backend), "–")


def cells(row: dict[str, str]) -> list[str]:
    found = []
    for part in ("training", "validation"):
        both = [float(row[f"{how}_{part}_bytes"]) for how in ("estimated", "measured")]
        found += [*(f"{size / 1e6:,.0f}" for size in both), f"{both[0] / both[1] - 1:+.1%}"]
    return [*found, f"{error(row):+.1%}"]


def error(row: dict[str, str]) -> float:
    """Of the plan's peak, relative to the measured one."""
    estimated, measured = (
        max(float(row[f"{how}_{part}_bytes"]) for part in ("training", "validation"))
        for how in ("estimated", "measured")
    )
    return estimated / measured - 1


def promises(newest: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    """One line a backend: the largest error."""
    lines = []
    for backend in dict.fromkeys(key[0] for key in newest):
        errors = [abs(error(row)) for (name, _), row in newest.items() if name == backend]
        lines.append(
            f"- {backend}: the estimate is within {max(errors):.1%} of the probe on "
            f"{len(errors)} recipes."
        )
    return lines


if __name__ == "__main__":
    app()
