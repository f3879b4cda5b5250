"""What grows with rows or runs, and needs no framework: data from a file to steps, a teacher cache,
the page of a sweep.

As in growth_models.py: `make` holds the inputs, and returns one repetition.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]

import made_runs  # noqa: E402

from benchmarks.growth_models import Repetition, measured  # noqa: E402
from benchmarks.workers import Numbers  # noqa: E402
from mlx_distill.backends.protocol import Ranks  # noqa: E402
from mlx_distill.data.batches import Batch, Steps, make_batch  # noqa: E402
from mlx_distill.data.prepare import Prepared, prepare  # noqa: E402
from mlx_distill.data.sequences import TokenSequence  # noqa: E402
from mlx_distill.embedded.tokenizer import build_tokenizer  # noqa: E402
from mlx_distill.recipe.recipe import Recipe  # noqa: E402
from mlx_distill.recipe.training_tables import BatchTable  # noqa: E402
from mlx_distill.reporting.drawing import drawn  # noqa: E402
from mlx_distill.runs.logs import kept_digests  # noqa: E402
from mlx_distill.runs.manifest import Manifest  # noqa: E402
from mlx_distill.runs.small_files import SmallFiles  # noqa: E402
from mlx_distill.scoring.task_scores import TaskScores  # noqa: E402
from mlx_distill.sweeps.points import Point  # noqa: E402
from mlx_distill.sweeps.results import write_results  # noqa: E402
from mlx_distill.sweeps.sweep import Sweep, load_sweep  # noqa: E402
from mlx_distill.teaching.cached_teacher import CachedTeacher  # noqa: E402
from mlx_distill.teaching.fields import CacheFields  # noqa: E402
from mlx_distill.teaching.fill import fill  # noqa: E402
from mlx_distill.teaching.folder import TeacherCache  # noqa: E402

IDS, WIDTH, KEPT, DRAWS = 264, 64, 8, 12  # of the stand-in for a teacher
FRACTIONS, SEEDS, PROBLEMS, STEPS = (0.1, 0.25, 0.5, 0.75, 1.0), (1, 2), 200, 50


# rows


def rows(count: int, backend: str, scratch: Path) -> Repetition:
    """Two starts and an epoch: rows read, rendered, tokenised, segmented and cut; the same from the
    kept renderings; all steps of an epoch as batches.
    """
    source = scratch / f"rows-{count}.jsonl"
    write_rows(source, count)
    recipe = Recipe.model_validate(
        {
            "student": {"model": "embedded:student"},
            "teacher": {"model": "embedded:teacher"},
            "data": {"source": str(source)},
            "truncation": {"fraction": 0.5},
            "optim": {"learning_rate": 1e-4},
        }
    )
    tokenizer = build_tokenizer()

    def both() -> dict[str, Numbers]:
        kept = scratch / f"kept-{count}"
        shutil.rmtree(kept, ignore_errors=True)
        os.environ["XDG_CACHE_HOME"] = str(kept)
        prepared: list[Prepared] = []

        def start() -> None:
            prepared[:] = [prepare(recipe, tokenizer)]

        def epoch() -> None:
            steps = Steps(prepared[0].train, recipe.objective.segments, recipe.batch, 0)
            for _ in steps:
                pass

        found = {"first start": measured(start)}
        prepared.clear()
        found["second start"] = measured(start)
        return found | {"an epoch's steps": measured(epoch)}

    return both


def write_rows(path: Path, count: int) -> None:
    numbers = np.random.default_rng(0).integers(100, 999, (count, 3)).tolist()
    with path.open("w") as file:
        for i, (a, b, c) in enumerate(numbers):
            solution = f"{a} + {b} = {a + b}.\n{a + b} + {c} = {a + b + c}."
            row = {"prompt": f"What is {a} + {b} + {c}? ({i})", "reasoning": solution}
            file.write(json.dumps(row | {"answer": str(a + b + c)}) + "\n")


# a teacher cache


class _Alone:
    """As much of a backend as a cache asks for."""

    ranks = Ranks()
    all_sum = staticmethod(lambda values: values)
    cached_head = staticmethod(lambda matrix: matrix)
    cached_targets = staticmethod(lambda states, head: states)


class _Answers:
    """A teacher that says the same of every token: what is measured is the cache."""

    vocabulary_rows = IDS

    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, ...]:
        count = len(batch.positions)
        ids = np.tile(np.arange(k, dtype=np.int32), (count, 1))
        return ids, np.full((count, k), -3, np.float32), np.full(count, -5, np.float32)

    def draw(self, batch: Batch, uniform: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        count = len(uniform)
        drawn_ids = (uniform * rows).astype(np.int32)
        return drawn_ids, np.ones(count, np.float32), np.zeros(count, np.int32)

    def states(self, batch: Batch) -> np.ndarray:
        return np.ones((len(batch.positions), WIDTH), np.float32)

    def head_matrix(self) -> np.ndarray:
        return np.ones((IDS, WIDTH), np.float32)


def cache(count: int, kind: str, scratch: Path) -> Repetition:
    """Writing one, and reading it: opened, looked through for what it lacks, and an epoch's
    targets. `kind` stands where other things have their backend.
    """
    random_ = np.random.default_rng(0)
    lengths = random_.integers(40, 100, count).tolist()
    sequences = [
        TokenSequence(
            f"{i:016x}",
            random_.integers(0, IDS, length).astype(np.int32),
            10,
            length - 5,
            np.ones(length, bool),
        )
        for i, length in enumerate(lengths)
    ]
    order = random_.permutation(count).tolist()
    table = BatchTable()
    groups = [order[i : i + table.micro_batch_size] for i in range(0, count, 4)]
    fields = CacheFields(
        kind,
        teacher_fingerprint="0" * 16,
        quantize_bits=0,
        tokenizer_digest="0" * 16,
        vocabulary_rows=IDS,
        top_k=KEPT if kind == "top_k" else 0,
        samples=DRAWS if kind == "sampled" else 0,
        dtype="float16" if kind == "top_k" else "",
    )
    root = scratch / f"cache-{count}"

    def write() -> None:
        lacking = TeacherCache(root, fields)
        counter = lambda label, total: lambda more: None  # noqa: E731
        fill(lacking, sequences, _Answers, _Alone(), table, {}, lambda text: None, counter)

    def read() -> None:
        kept = TeacherCache(root, fields)
        assert not kept.missing(sequences)
        teacher = CachedTeacher(kept, _Alone())
        for group in groups:
            teacher.targets(make_batch([sequences[i] for i in group], ("cot",), table.pad_multiple))

    def both() -> dict[str, Numbers]:
        shutil.rmtree(root, ignore_errors=True)
        found = {f"write, {kind}": measured(write), f"read, {kind}": measured(read)}
        shutil.rmtree(root)
        return found

    return both


# the page of a sweep


def page(count: int, backend: str, scratch: Path) -> Repetition:
    """Runs that are done → rows, page and best recipes; two seeds of each condition."""
    weights = [round(i / count, 4) for i in range(count // len(FRACTIONS) // len(SEEDS))]
    path = scratch / f"sweep-{count}.toml"
    folder = scratch / f"sweep-{count}"
    path.write_text(
        f'recipe = "{HERE.parent}/mlx_distill/recipes/cot50.toml"\n'
        f'folder = "{folder}"\nseeds = {list(SEEDS)}\n'
        f"[axes]\ntruncation.fraction = {list(FRACTIONS)}\nobjective.kd_weight = {weights}\n"
    )
    sweep: Sweep = load_sweep(path)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "best").mkdir(parents=True)
    for number, point in enumerate(sweep.points):
        write_run(point, number)

    def write() -> None:
        drawn.cache_clear()
        write_results(sweep, {})

    return lambda: {"page": measured(write)}


def write_run(point: Point, number: int) -> None:
    """A finished run of a point, with made-up numbers."""
    kept, files = SmallFiles(HERE / "cot50-ce"), SmallFiles(point.folder.path)
    files.path.mkdir(parents=True)
    files.write_text("recipe.toml", point.recipe.toml())
    for row in made_runs.make_metrics(STEPS, 0.5, 0.2, random.Random(number)):
        files.append(row)
    for row in made_runs.make_validation(STEPS, 0.2):
        files.append(row)
    cost = 1e12 * point.recipe.truncation.fraction * (1 + point.recipe.objective.kd_weight)
    said = {
        "name": point.name,
        "steps": STEPS,
        "exported_step": STEPS,
        "flops": {"student": cost, "total": cost},
        "logs": kept_digests(files.path),
        "finished": True,
    }
    files.write(kept.read(Manifest).model_copy(update=said))
    right = int(PROBLEMS * point.recipe.truncation.fraction / 2) + number % 40
    scores = {"student": made_runs.make_score(right, PROBLEMS)}
    task = {"task": "embedded:dial", "scores": scores}
    files.write(kept.read(TaskScores).model_copy(update=task))
    (files.path / "report.html").write_text("")
