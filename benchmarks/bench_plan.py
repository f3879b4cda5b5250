"""What `plan` says against what a training step takes: peak memory and FLOPs of recipes that differ
in what decides them.

    python benchmarks/bench_plan.py run      measure, append to results/bench_plan.csv, rewrite the
    README's table python benchmarks/bench_plan.py table    rewrite the table only

Models have random weights. Each recipe is measured in a fresh process: one optimizer step, twice,
by the backend's own counter (`Backend.memory()`), less what the process held before it loaded a
model, which is nothing where a framework counts its own arrays and the interpreter where memory is
resident memory. FLOPs are counted independently, by torch's flop counter over a step of the torch
backend in a process of its own; without torch that column stays empty. Of attention's products it
counts the masked half as well, which is taken off here, since a plan counts causal attention.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from benchmarks.machines import blas_name, facts, installed  # noqa: E402
from benchmarks.tables import append_rows, read_rows, rewrite_section  # noqa: E402

MEASURED = (
    "mlx_distill/cost/plan.py",
    "mlx_distill/cost/memory.py",
    "mlx_distill/cost/flops.py",
    "mlx_distill/backends",
)
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
        ("student.tuning=lora",),
    ),
    "LoRA on 4 blocks, long": (
        {"layers": 12},
        {},
        512,
        ("student.tuning=lora", "student.lora_layers=4"),
    ),
    "LoRA, checkpointing": (
        {"layers": 16, "width": 384, "heads": 6, "ffn": 1024},
        {},
        384,
        ("student.tuning=lora", "student.gradient_checkpointing=true"),
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
        list[str] | None, typer.Option(help="names; default: the backend's ten")
    ] = None,
) -> None:
    """Measure the recipes one after the other and keep the rows."""
    for name in recipe or names(backend):
        row = measure(backend, name)
        append_rows("bench_plan", [row])
        print(
            {
                key: value
                for key, value in row.items()
                if key not in ("date", "cpu", "cores", "python")
            },
            flush=True,
        )
        table()


def names(backend: str) -> list[str]:
    """The recipes of a backend."""
    others = INSTEAD if backend == "torch" else INSTEAD.values()
    return [name for name in RECIPES if name not in others]


@app.command()
def table() -> None:
    """Rewrite the README's table from the kept rows: the newest row of each backend and recipe."""
    rewrite_section("plan", render(read_rows("bench_plan")))


def measure(backend: str, name: str) -> dict[str, object]:
    """One row: the plan of a recipe, and its step as measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_world(Path(folder), name)
        planned = json.loads(ask("planned", backend, str(path)))
        measured = json.loads(ask("worker", backend, str(path)))
        counted = json.loads(ask("counted", str(path))) if installed("torch") else {"flops": ""}
    return {
        **facts(*MEASURED),
        "backend": backend,
        "version": installed(backend),
        "blas": blas_name() if backend == "mlx" else "",
        "device": measured["device"],
        "recipe": name,
        "planned_peak_bytes": round(planned["peak_bytes"]),
        "moment": planned["moment"],
        "measured_peak_bytes": measured["peak_bytes"],
        "before_bytes": measured["before_bytes"],
        "planned_flops": round(planned["flops"]),
        "counted_flops": counted["flops"],
        "seconds": round(measured["seconds"], 4),
        "matmul_rate": round(measured["rate"]),
    }


def ask(*words: str) -> str:
    """The last line that a process of this file prints."""
    answer = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with code {answer.returncode}: {answer.stderr[-2000:]}"
        )
    return answer.stdout.splitlines()[-1]


def write_world(root: Path, name: str) -> Path:
    """Models with random weights, rows and `recipe.toml` in a folder."""
    student, teacher, tokens, settings = RECIPES[name]
    write_model(root / "student", STUDENT | student, 0)
    models = (
        f'[student]\nmodel = "{root}/student"\n[teacher]\nmodel = '
        f'"{"" if teacher is None else f"{root}/teacher"}"\n'
    )
    if teacher is not None:
        write_model(root / "teacher", TEACHER | teacher, 1)
    write_rows(root / "rows.jsonl", tokens)
    (root / "settings.json").write_text(json.dumps(settings))
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


def load(path: str):
    """(recipe, prepared, {"student", "teacher": folder})."""
    from mlx_distill.data.prepare import prepare
    from mlx_distill.models.hub import load_tokenizer
    from mlx_distill.recipe.load import load_recipe

    recipe = load_recipe(
        Path(path), tuple(json.loads((Path(path).parent / "settings.json").read_text()))
    )
    folders = {
        part: Path(getattr(recipe, part).model)
        for part in ("student", "teacher")
        if getattr(recipe, part).model
    }
    return recipe, prepare(recipe, load_tokenizer(folders["student"])), folders


def first_step(recipe, prepared):
    """The one step of the recipe."""
    from mlx_distill.data.batches import Steps

    optim = recipe.optim
    return Steps(
        prepared.train,
        recipe.objective.segments,
        recipe.batch,
        recipe.run.seed,
        optim.epochs,
        optim.steps,
    ).step(0)


@app.command(hidden=True)
def planned(backend: str, path: str) -> None:
    """The plan of a recipe's one step; the loss's elementwise operations are left out, which no
    counter of products sees.
    """
    from mlx_distill.cost.plan import make_plan
    from mlx_distill.machine import this_machine
    from mlx_distill.models.folder import read_config

    recipe, prepared, folders = load(path)
    configs = {part: read_config(folder) for part, folder in folders.items()}
    plan = make_plan(
        recipe, prepared, configs.get("teacher"), configs["student"], this_machine(backend)
    )
    peak = plan.training_peak
    print(
        json.dumps(
            {
                "peak_bytes": peak.total,
                "moment": peak.name,
                "flops": plan.total_flops - plan.flops["loss"],
            }
        )
    )


def models(backend, recipe, folders: dict[str, Path]):
    """Student and teacher (or None), ready to train."""
    student = backend.load_student(folders["student"], "student", recipe)
    teacher = (
        backend.load_teacher(folders["teacher"], "teacher", recipe.teacher.quantize_bits)
        if "teacher" in folders
        else None
    )
    student.vocabulary = min(
        model.vocabulary_rows for model in (student, teacher) if model is not None
    )
    return student, teacher


def train_step(step, student, teacher, recipe) -> Iterator[None]:
    """One optimizer step as `training/loop.py` runs it; yields after each micro-batch and at the end."""
    from mlx_distill.objective import Objective

    objective = Objective.from_table(recipe.objective)
    for batch in step.batches:
        targets = teacher.targets(batch) if teacher and objective.needs_teacher else None
        student.accumulate(batch, targets, objective, step.loss_tokens)
        yield
    student.apply(recipe.optim.learning_rate)
    yield


@app.command(hidden=True)
def worker(backend: str, path: str) -> None:
    """Train the step twice; peak memory of the larger, seconds of the faster, the rate of large
    products beside it.
    """
    from mlx_distill.backends import choose_backend

    chosen = choose_backend(backend)
    recipe, prepared, folders = load(path)
    step, before = first_step(recipe, prepared), chosen.memory().active_bytes
    student, teacher = models(chosen, recipe, folders)
    peaks, seconds, rates = [], [], []
    for _ in range(2):
        rates.append(chosen.matmul_rate())
        chosen.reset_peak_memory()
        started = time.perf_counter()
        for _ in train_step(step, student, teacher, recipe):
            pass
        seconds.append(time.perf_counter() - started)
        peaks.append(chosen.memory().peak_bytes)
    device = chosen.device().device.split()[0].lower()
    print(
        json.dumps(
            {
                "peak_bytes": max(peaks) - before,
                "before_bytes": before,
                "seconds": min(seconds),
                "rate": max(rates),
                "device": device,
            }
        )
    )


@app.command(hidden=True)
def counted(path: str) -> None:
    """Operations of the same step's products by torch's flop counter, half of attention's taken
    off.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from mlx_distill.backends.torch.backend import TorchBackend

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    recipe, prepared, folders = load(path)
    plain = {
        "teacher": {"quantize_bits": 0},
        "optim": {"optimizer": "adamw"},
    }  # the same products, and torch has no Lion
    recipe = recipe.model_copy(
        update={
            part: getattr(recipe, part).model_copy(update=values) for part, values in plain.items()
        }
    )
    student, teacher = models(TorchBackend(), recipe, folders)

    def in_place(total: list[int], left: list[int], right: list[int], **_) -> int:
        return 2 * left[0] * left[1] * right[1]

    extra = {
        torch.ops.aten.addmm_: in_place
    }  # which the counter does not know; the math kernel's products are ordinary ones: bmm
    with (
        FlopCounterMode(display=False, custom_mapping=extra) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        for _ in train_step(first_step(recipe, prepared), student, teacher, recipe):
            pass
    operations = {
        str(name).removeprefix("aten."): value
        for name, value in counter.get_flop_counts()["Global"].items()
    }
    attention = operations.pop("bmm", 0)
    print(
        json.dumps(
            {
                "flops": sum(operations.values()) + attention // 2,
                "attention": attention,
                "others": operations,
            }
        )
    )


def render(rows: list[dict[str, str]]) -> str:
    """A Markdown table of the newest row of each backend and recipe, and how far off the plan was."""
    newest = {(row["backend"], row["recipe"]): row for row in rows}
    last = rows[-1]
    lines = [
        f"{last['cpu']}, {last['cores']} cores shared with other work, MLX "
        f"{versions(rows, 'mlx')}, torch {versions(rows, 'torch')}, Python {last['python']}, "
        f"{last['date'][:10]}, commit {last['commit']}. Peaks in MB: planned, measured, and the "
        "plan's error. FLOPs of the step: planned, counted by torch, error. The last column is "
        "the step's seconds × the rate of large products / FLOPs.",
        "",
        "| backend | recipe | peak planned | measured | error | moment | GFLOP planned | counted "
        "| error | s × rate / FLOP |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {backend} ({row['device']}) | {name} | {' | '.join(cells(row))} |"
        for (backend, name), row in newest.items()
    ]
    return "\n".join([*lines, "", *promises(newest)])


def versions(rows: list[dict[str, str]], backend: str) -> str:
    return next((row["version"] for row in reversed(rows) if row["backend"] == backend), "–")


def cells(row: dict[str, str]) -> list[str]:
    counted = f"{float(row['counted_flops']) / 1e9:,.1f}" if row["counted_flops"] else "–"
    return [
        f"{float(row['planned_peak_bytes']) / 1e6:,.0f}",
        f"{float(row['measured_peak_bytes']) / 1e6:,.0f}",
        f"{memory_error(row):+.1%}",
        row["moment"],
        f"{float(row['planned_flops']) / 1e9:,.1f}",
        counted,
        f"{flops_error(row):+.1%}" if row["counted_flops"] else "–",
        f"{time_factor(row):.1f}",
    ]


def memory_error(row: dict[str, str]) -> float:
    return float(row["planned_peak_bytes"]) / float(row["measured_peak_bytes"]) - 1


def flops_error(row: dict[str, str]) -> float:
    return float(row["planned_flops"]) / float(row["counted_flops"]) - 1


def time_factor(row: dict[str, str]) -> float:
    return float(row["seconds"]) * float(row["matmul_rate"]) / float(row["planned_flops"])


def promises(newest: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    """One line a backend: the largest errors and the median factor of time."""
    lines = []
    for backend in dict.fromkeys(key[0] for key in newest):
        rows = [row for (name, _), row in newest.items() if name == backend]
        flops = [abs(flops_error(row)) for row in rows if row["counted_flops"]]
        factors = sorted(map(time_factor, rows))
        lines.append(
            f"- {backend}: peak memory is planned within "
            f"{max(abs(memory_error(row)) for row in rows):.1%} on {len(rows)} recipes"
            + (f", FLOPs within {max(flops):.1%}" if flops else "")
            + f"; a step takes {factors[len(factors) // 2]:.1f} times (from {factors[0]:.1f} to "
            f"{factors[-1]:.1f}) what its FLOPs would "
            "at the rate of large products."
        )
    return lines


if __name__ == "__main__":
    app()
