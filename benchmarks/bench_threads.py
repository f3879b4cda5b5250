"""What a second BLAS thread is worth, by the width of the model: wall and processor seconds of a
training step, with one thread and with two.

    python benchmarks/bench_threads.py run      append to results/bench_threads.csv, rewrite the
                                                README's table
    python benchmarks/bench_threads.py table    rewrite the table only

Llamas with random weights learn from themselves with noise, on the CPU in float32: four blocks, an
MLP of 8/3 widths, 2,048 ids, 16 sequences of 112 tokens, as cot50 has them. Contenders are
processes that take turns, a few steps each. Needs a machine with nothing else to do.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machines, models_torch, workers
from benchmarks.tables import append_rows, read_rows, rewrite_section

FILE = "bench_threads"
WIDTHS = (64, 128, 256, 384, 512, 768)
BACKENDS = ("mlx", "torch")
THREADS = (1, 2)
ROUNDS, STEPS, SECONDS = 3, 2, 0.5
app = typer.Typer(add_completion=False)


def config(width: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "intermediate_size": 8 * width // 3,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
    }


@app.command()
def run() -> None:
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", *workers.THREADS):
        os.environ.pop(name, None)  # a machine's own choice is measured
    with tempfile.TemporaryDirectory() as scratch:
        for width in WIDTHS:
            folder = models_torch.random_folder(
                config(width), Path(scratch) / str(width), "cpu", 0, "float32"
            )
            for backend in BACKENDS:
                append_rows(FILE, compared(backend, width, folder))
    table()


def compared(backend: str, width: int, folder: Path) -> list[dict[str, object]]:
    """A row for each number of threads, of processes that took turns."""
    running = {
        threads: workers.start(__file__, [backend, str(folder)], threads) for threads in THREADS
    }
    found: dict[int, list[workers.Numbers]] = {threads: [] for threads in THREADS}
    for _ in range(ROUNDS):
        for threads, worker in running.items():
            found[threads].append(workers.ask(worker))
    for worker in running.values():
        workers.stop(worker)
    rows = []
    for threads, repetitions in found.items():
        row = {
            **machines.facts("mlx_distill/backends"),
            "backend": backend,
            "blas": machines.blas_name() if backend == "mlx" else "torch",
            "width": width,
            "threads": threads,
            "rounds": ROUNDS,
            "seconds": statistics.median(one["seconds"] for one in repetitions),
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in repetitions),
        }
        print(*(row[key] for key in ("backend", "width", "threads", "seconds", "cpu_seconds")))
        rows.append(row)
    return rows


def repetition(backend: str, folder: Path) -> Callable[[], workers.Numbers]:
    """Some steps, timed together; the first was made before."""
    from mlx_distill.backends import choose_backend
    from mlx_distill.objective import Objective
    from mlx_distill.recipe.recipe import Recipe

    chosen = choose_backend(backend)
    recipe = Recipe.model_validate(
        {"student": {"model": str(folder)}, "optim": {"learning_rate": 1e-4, "steps": 1}}
        | {"teacher": {"model": str(folder)}, "data": {"source": "embedded:dial"}}
    )
    student = chosen.load_student(folder, "student", recipe)
    teacher = chosen.load_teacher(folder, "teacher")
    student.compare_first(student.vocabulary_rows)
    step, objective = models_torch.make_step(2048, 16, 112, 16), Objective(kd_weight=0.5)

    def steps(count: int) -> None:
        for _ in range(count):
            for batch in step.batches:
                targets = teacher.targets(batch)
                student.accumulate(batch, targets, objective, step.loss_tokens)
            student.apply(1e-4)

    steps(2)

    def measured() -> workers.Numbers:
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while count < STEPS or time.perf_counter() - wall < SECONDS:
            steps(1)
            count += 1
        return {
            "seconds": (time.perf_counter() - wall) / count,
            "cpu_seconds": (time.process_time() - cpu) / count,
        }

    return measured


@app.command()
def table() -> None:
    lines = [
        "| | width | one thread | two threads | processor time |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = {
        (row["backend"], int(row["width"]), int(row["threads"])): row for row in read_rows(FILE)
    }
    for backend in BACKENDS:
        for width in WIDTHS:
            one, two = rows[backend, width, 1], rows[backend, width, 2]
            wall = float(two["seconds"]) / float(one["seconds"])
            cpu = float(two["cpu_seconds"]) / float(one["cpu_seconds"])
            milliseconds = 1000 * float(one["seconds"])
            lines.append(
                f"| {backend} | {width} | {milliseconds:.0f} ms | {wall:.2f} × | {cpu:.2f} × |"
            )
    rewrite_section("threads", "\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        workers.serve(lambda: repetition(sys.argv[2], Path(sys.argv[3])))
    else:
        app()
