"""One training step in a process of its own: how much memory it takes.

In: a line of JSON on stdin, as `cost/probe.py` writes it. Out: a line of JSON on stdout: peaks in
bytes, or how it went wrong. Decided here: what is done (the costliest micro-batch, twice where a
step has several, the optimizer's step, then a batch of validation), with the real models and random
tokens; and that the process ends when whoever asked is gone, which closes stdin.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.backends import choose_backend
from mlx_distill.backends.protocol import Backend, SparseTargets, Student, Targets, Teacher
from mlx_distill.data.batches import Batch
from mlx_distill.errors import DistillError, OutOfMemory, says_out_of_memory
from mlx_distill.files import one_line
from mlx_distill.models.folder import read_config
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe


def main() -> None:
    """Answer the question on stdin."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_who_asked, daemon=True).start()
    print(json.dumps(answer(asked)), flush=True)
    os._exit(0)


def _end_with_who_asked() -> None:
    os.read(0, 1)
    os._exit(1)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Peaks, or `wrong`: "memory", "refused" or "crashed", and what was said."""
    try:
        return measure(asked)
    except (OutOfMemory, MemoryError) as error:
        return {"wrong": "memory", "said": one_line(error)}
    except DistillError as error:
        return {"wrong": "refused", "said": str(error)}
    except Exception as error:
        said = one_line(error)
        if says_out_of_memory(said):
            return {"wrong": "memory", "said": said}
        return {"wrong": "crashed", "said": f"{type(error).__name__}: {said}"}


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """Peaks of training and validation less what was held before the models, and `least_bytes`,
    which no true counter can be below: trained numbers in float32, frozen ones in four bits.
    """
    recipe, backend = Recipe.model_validate(asked["recipe"]), choose_backend(asked["backend"])
    before = backend.memory().active_bytes
    student = backend.load_student(Path(asked["student"]), recipe.student.model, recipe)
    teacher = _teacher(asked, recipe, backend)
    rows = min(model.vocabulary_rows for model in (student, teacher) if model is not None)
    student.compare_first(rows)
    objective = Objective.from_table(recipe.objective)
    if objective.matches_hidden:
        student.match_hidden(teacher)

    batch = _batch(**asked["training"], vocabulary=rows)
    backend.reset_peak_memory()
    for _ in range(2 if asked["accumulates"] else 1):
        targets = teacher.targets(batch) if teacher and objective.needs_teacher else None
        student.accumulate(batch, targets, objective, float(len(batch.positions)))
    student.apply(recipe.optim.learning_rate)
    training = backend.memory().peak_bytes - before

    backend.reset_peak_memory()
    if asked["validation"]:
        batch = _batch(**asked["validation"], vocabulary=rows)
        yardstick = Objective(kd_weight=objective.kd_weight)
        student.score(batch, teacher.targets(batch) if teacher else None, yardstick)
    validation = backend.memory().peak_bytes - before if asked["validation"] else 0
    return {
        "training_bytes": training,
        "validation_bytes": validation,
        "least_bytes": _least_bytes(student, teacher),
    }


def _least_bytes(student: Student, teacher: Teacher | None) -> float:
    frozen = student.parameters - student.trainable
    return 4 * student.trainable + (frozen + getattr(teacher, "parameters", 0)) / 2


def _batch(sequences: int, length: int, positions: int, vocabulary: int) -> Batch:
    """Random tokens [B, T], of which so many carry loss."""
    random = np.random.default_rng(0)
    return Batch(
        tokens=random.integers(0, vocabulary, (sequences, length), np.int32),
        positions=np.arange(positions, dtype=np.int32) % (sequences * length),
        targets=random.integers(0, vocabulary, positions, np.int32),
        segment=np.ones(positions, np.int8),
        weight=np.ones(positions, np.float32),
        lengths=np.full(sequences, length, np.int32),
        ids=("",) * sequences,
    )


def _teacher(asked: dict[str, Any], recipe: Recipe, backend: Backend) -> Any:
    """The teacher, or what answers in its place where its answers lie on disk; None without one."""
    if not asked["teacher"]:
        return None
    folder = Path(asked["teacher"])
    if recipe.teacher.cache == "off":
        table = recipe.teacher
        return backend.load_teacher(folder, table.model, table.quantize_bits, table.compute_dtype)
    config = read_config(folder)
    rows, width = config["vocab_size"], config["hidden_size"]
    if recipe.teacher.cache == "hidden":
        return _KeptStates(backend, rows, width)
    sampled = recipe.teacher.cache == "sampled"
    kept = recipe.teacher.cache_samples if sampled else recipe.teacher.cache_top_k
    return _KeptAnswers(rows, min(kept, rows))


class _KeptStates:
    """Hidden states as a cache has them: zeros [N, D] and a head [V, D]."""

    def __init__(self, backend: Backend, rows: int, width: int):
        self.backend, self.vocabulary_rows, self.width = backend, rows, width
        # bfloat16 goes through numpy as its bits
        self.dtype = np.float32 if backend.device().dtype == "float32" else np.uint16
        self.head = backend.cached_head(np.zeros((rows, width), self.dtype))

    def targets(self, batch: Batch) -> Targets:
        states = np.zeros((len(batch.positions), self.width), self.dtype)
        return self.backend.cached_targets(states, self.head)


class _KeptAnswers:
    """K equally likely ids a position, the text's own first, and half of the mass on all others."""

    def __init__(self, rows: int, kept: int):
        self.vocabulary_rows, self.kept = rows, kept

    def targets(self, batch: Batch) -> SparseTargets:
        shape = len(batch.positions), self.kept
        return SparseTargets(
            ids=(batch.targets[:, None] + np.arange(self.kept, dtype=np.int32))
            % self.vocabulary_rows,
            log_probs=np.full(shape, -np.log(2 * self.kept), np.float32),
            tail=np.full(shape[0], np.log(0.5), np.float32),
            offset=np.zeros(shape[0], np.float32),
            top=np.zeros(shape[0], np.int32),
        )
