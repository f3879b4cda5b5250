"""Whole training steps on MLX: forward, loss, backward, update, ours and the peers' own.

Every contender trains the same weights (mlx-lm's model, with the adapters that a recipe adds where
it trains those) on the same batch with AdamW:

- mlx-lm: `mlx_lm.tuner.trainer.train` itself, whose step is compiled whole, with its own loss.
- unsloth-cce: the same with unsloth_zoo's chunked cross-entropy (`mlx.utils.make_cce_loss_fn`).
- unsloth-gkd: the same with unsloth_zoo's loss of a teacher (`mlx.distill.build_gkd_loss_fn`, β = 0,
  forward KL): the teacher is called in the step, as its trainer does.
- ours: `MlxBackend`, through the verbs that the training loop uses. It also takes the gradient's
  norm and clips it, which the peers' defaults do not.

The peers' loop asks for a batch before each step and evaluates all after it: between two requests
lies one step. unsloth_zoo is made for Macs and asks for CUDA's libraries elsewhere; its MLX modules
need neither, so they are imported past its first file.
"""

import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.models_torch import make_step
from benchmarks.workers import Numbers
from mlx_distill.data.batches import Step

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

LEARNING_RATE = 1e-5
PEERS = {"ce": ("mlx-lm", "unsloth-cce"), "kd": ("unsloth-gkd",)}


@dataclass(frozen=True)
class Case:
    """One comparison: `tuning` is "lora" or "full", `term` "ce" (no teacher) or "kd" (forward KL
    alone).
    """

    student: str
    teacher: str
    tuning: str
    term: str
    batch: int
    tokens: int
    prompt_tokens: int

    def step(self) -> Step:
        return make_step(self.vocabulary, self.batch, self.tokens, self.prompt_tokens)

    @property
    def vocabulary(self) -> int:
        from benchmarks.models_torch import config_of

        return config_of(self.student, "")["vocab_size"]

    def recipe(self) -> Any:
        from mlx_distill.recipe.recipe import Recipe
        from mlx_distill.recipe.tables import DataTable, StudentTable, TeacherTable
        from mlx_distill.recipe.training_tables import ObjectiveTable, OptimTable

        return Recipe(
            teacher=TeacherTable(model="teacher"),
            data=DataTable(source="rows.jsonl"),
            student=StudentTable(model="student", tuning=self.tuning, compute_dtype="float32"),
            objective=ObjectiveTable(kd_weight=float(self.term == "kd")),
            optim=OptimTable(learning_rate=LEARNING_RATE),
        )


def run(contender: str, case: Case, requests: Iterator[Callable[[Numbers], None]]) -> None:
    """Answer each request with the numbers of one step; the first steps, which compile, are not
    measured.
    """
    from mlx_distill.blas import load_blas

    load_blas()
    (_ours if contender == "ours" else _peer)(contender, case, requests)


class _Meter:
    """Times and MLX's peak between two moments."""

    def __init__(self, loss: float, norm: float):
        self.said = {"loss": loss, "grad_norm": norm}

    def start(self) -> None:
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        self.held = mx.get_active_memory()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Numbers:
        import mlx.core as mx

        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        return {
            **self.said,
            "seconds": wall,
            "cpu_seconds": cpu,
            "peak_bytes": mx.get_peak_memory(),
            "held_bytes": self.held,
        }


def _ours(_: str, case: Case, requests: Iterator[Callable[[Numbers], None]]) -> None:
    step = Ours(case)
    loss, norm = step.accumulate(), step.apply()
    meter = _Meter(loss, norm)
    for answer in requests:
        meter.start()
        step.accumulate()
        step.apply()
        answer(meter.stop())


class Ours:
    """The MLX backend."""

    def __init__(self, case: Case):
        from mlx_distill.backends.mlx.backend import MlxBackend
        from mlx_distill.objective import Objective

        backend, recipe = MlxBackend(), case.recipe()
        learns = case.term == "kd"
        self.teacher = backend.load_teacher(Path(case.teacher), "teacher") if learns else None
        self.student = backend.load_student(Path(case.student), "student", recipe)
        self.step, self.objective = case.step(), Objective(kd_weight=float(learns))

    def accumulate(self) -> float:
        """The loss, whose gradients are then held by the student."""
        (batch,) = self.step.batches
        targets = self.teacher.targets(batch) if self.teacher else None
        sums = self.student.accumulate(batch, targets, self.objective, self.step.loss_tokens)
        return float(self.objective.total(sums.terms).sum()) / self.step.loss_tokens

    def apply(self) -> float:
        """The gradients' norm before clipping; the weights have moved and the gradients are gone."""
        return self.student.apply(LEARNING_RATE)


def _peer(contender: str, case: Case, requests: Iterator[Callable[[Numbers], None]]) -> None:
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx.utils import tree_flatten
    from mlx_lm.tuner import trainer

    model = peer_model(case)
    loss_of = peer_loss(contender, case, model)
    tokens = mx.array(case.step().batches[0].tokens)
    batch = tokens, mx.array([[case.prompt_tokens, case.tokens]] * case.batch)
    loss, gradients = value_and_gradients(model, loss_of, batch)
    norm = sum(g.square().sum(-1).sum() for _, g in tree_flatten(gradients)).sqrt().item()
    del gradients
    meter = _Meter(loss, norm)

    def batches(**_: object) -> Iterator[tuple["mx.array", "mx.array"]]:
        yield batch
        for answer in requests:
            meter.start()
            yield batch
            answer(meter.stop())

    trainer.TrainUI = _Silent
    endless = trainer.TrainingArgs(iters=sys.maxsize, steps_per_report=2**62, steps_per_save=2**62)
    optimizer = optimizers.AdamW(LEARNING_RATE, bias_correction=True)
    trainer.train(model, optimizer, [], args=endless, loss=loss_of, iterate_batches=batches)


def peer_model(case: Case) -> "nn.Module":
    """mlx-lm's model, with a recipe's adapters."""
    from mlx_distill.backends.mlx import loading

    recipe = case.recipe()
    return loading.load_student(
        Path(case.student), "student", recipe.student, recipe.run.seed
    ).model


def value_and_gradients(
    model: "nn.Module", loss_of: Callable, batch: tuple["mx.array", "mx.array"]
) -> tuple[float, dict]:
    import mlx.core as mx
    import mlx.nn as nn

    (loss, _), gradients = nn.value_and_grad(model, loss_of)(model, *batch)
    mx.eval(loss, gradients)
    return loss.item(), gradients


def peer_loss(contender: str, case: Case, model: "nn.Module") -> Callable:
    """(model, tokens [B, T], first and last place of each [B, 2]) → (mean loss, tokens), as mlx-lm's
    loop calls it.
    """
    if contender == "mlx-lm":
        from mlx_lm.tuner.trainer import default_loss

        return default_loss
    pass_over_first_file("unsloth_zoo")
    if contender == "unsloth-cce":
        from unsloth_zoo.mlx.utils import make_cce_loss_fn

        return make_cce_loss_fn(model)
    from unsloth_zoo.mlx.distill import build_gkd_loss_fn

    from mlx_distill.backends.mlx import loading

    teacher = loading.load_teacher(Path(case.teacher), "teacher", 0).model
    asked = SimpleNamespace(gkd_beta=0.0, gkd_temperature=1.0, max_seq_length=case.tokens)
    return build_gkd_loss_fn(teacher, asked, case.vocabulary, case.batch, 0, 2**62)


def pass_over_first_file(package: str) -> None:
    """Have the parts of a package importable without its `__init__.py`."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = bare


class _Silent:
    """mlx-lm's progress, which is not measured."""

    def __init__(self, *_: object, **__: object): ...

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self) -> None: ...
