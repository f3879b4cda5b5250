"""What grows with a model or a batch: the loss, the trunk and a checkpoint, on MLX or on torch.

Each `make` is called in a process of its own, which holds the inputs; what it returns is one
repetition: processor seconds and peak memory of each thing that it measures, by its name. Peak
memory is over what was held before: MLX's own counter, on torch the process's resident memory.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import contenders_mlx, contenders_torch, models_torch
from benchmarks.bench_threads import config
from benchmarks.machines import PeakMemory
from benchmarks.workers import Numbers
from mlx_distill.backends import choose_backend, chunks
from mlx_distill.cost.flops import Shape
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.checkpoints import Checkpoints, TrainState
from mlx_distill.training.loop import restore

Repetition = Callable[[], dict[str, Numbers]]
WIDTHS = (256, 512)  # student and teacher, in the loss
VOCABULARY, POSITIONS = 32_000, 512  # of the loss, where the other one grows
SUPERVISED = 16  # tokens of the trunk's sequences: head and loss are next to nothing
TRUNK = config(384) | {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}


def measured(work: Callable[[], object], backend: str = "") -> Numbers:
    """Seconds and peak memory of one call."""
    memory = PeakMemory(cuda=False)
    memory.start()
    if backend == "mlx":
        import mlx.core as mx

        before = mx.get_active_memory()
        mx.reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        **memory.stop(),
    }
    return found | {"peak_bytes": mx.get_peak_memory() - before} if backend == "mlx" else found


def loss_over_positions(positions: int, backend: str, scratch: Path) -> Repetition:
    return _loss(positions, VOCABULARY, backend)


def loss_over_vocabulary(vocabulary: int, backend: str, scratch: Path) -> Repetition:
    return _loss(POSITIONS, vocabulary, backend)


def _loss(positions: int, vocabulary: int, backend: str) -> Repetition:
    """Value and gradients for the hidden states and a head that trains."""
    family = {"mlx": contenders_mlx, "torch": contenders_torch}[backend]
    chunk = chunks.chunk_tokens(0, backend, "cpu")
    repetition = family.repetition("ours", positions, vocabulary, WIDTHS, True, chunk)
    return lambda: {"KD loss": repetition()}


def trunk(tokens: int, backend: str, scratch: Path) -> Repetition:
    """Forward and backward pass of one sequence, with and without gradient checkpointing."""
    students = {
        name: _student(TRUNK, backend, scratch, checkpointing)
        for name, checkpointing in (("trunk", False), ("trunk, checkpointing", True))
    }
    step = models_torch.make_step(TRUNK["vocab_size"], 1, tokens, tokens - SUPERVISED)

    def both() -> dict[str, Numbers]:
        return {
            name: measured(partial(_accumulate, student, step), backend)
            for name, student in students.items()
        }

    for student in students.values():  # what is compiled once
        _accumulate(student, models_torch.make_step(TRUNK["vocab_size"], 1, 64, 32))
    return both


def trunk_operations(tokens: int) -> tuple[float, float]:
    """Of a forward pass: those of all tokens, and attention's, which grow with their square."""
    shape = Shape.of(TRUNK)
    assert shape is not None
    attention = 2.0 * tokens**2 * shape.layers * shape.heads * shape.head_dim
    return shape.trunk([tokens]) - attention, attention


def checkpoint(width: int, backend: str, scratch: Path) -> Repetition:
    """Writing and reading one, of weights and AdamW's two moments."""
    student = _student(config(width), backend, scratch)
    _accumulate(student, models_torch.make_step(2048, 1, 16, 8))
    student.apply(1e-4)
    folder = scratch / f"checkpoints-{backend}-{width}"
    folder.mkdir()
    state = TrainState(step=1)

    def write() -> None:
        Checkpoints(folder).save(state, student.save_state)

    def read() -> None:
        kept = Checkpoints(folder)
        restore(student, kept.path(kept.newest().step))

    def both() -> dict[str, Numbers]:
        size = {"size": student.trainable}
        return {name: measured(work) | size for name, work in (("write", write), ("read", read))}

    return both


def _student(shape: dict, backend: str, scratch: Path, checkpointing: bool = False):
    width = shape["hidden_size"]
    folder = models_torch.random_folder(
        shape, scratch / f"model-{backend}-{width}", "cpu", 0, "float32"
    )
    recipe = Recipe.model_validate(
        {
            "student": {"model": str(folder), "gradient_checkpointing": checkpointing},
            "teacher": {"model": str(folder)},
            "data": {"source": "embedded:dial"},
            "optim": {"learning_rate": 1e-4, "steps": 1},
        }
    )
    return choose_backend(backend).load_student(folder, "student", recipe)


def _accumulate(student, step) -> None:
    (batch,) = step.batches
    student.accumulate(batch, None, Objective(kd_weight=0.0), step.loss_tokens)
