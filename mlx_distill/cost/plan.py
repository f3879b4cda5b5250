"""What a run will cost before it starts: tokens, steps, FLOPs, peak memory by part, disk, and
whether it fits.

In: a recipe, its prepared sequences and the two models' config.json. Out: a `Plan` of plain
numbers, and its lines. Needs no weights and imports no framework. Decided here: what counts as
fitting, and what to change if not.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.cost.flops import Adapters, training_flops
from mlx_distill.cost.memory import CALIBRATIONS, DTYPE_BYTES, FLOAT, Dense, Memory, Micro, Moment
from mlx_distill.data.batches import ALL_SEGMENTS, Steps
from mlx_distill.data.prepare import Prepared, count_tokens, cut_sequence
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import OutOfMemory
from mlx_distill.machine import Machine
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.recipe.tables import RunTable, TeacherTable
from mlx_distill.words import amount

if TYPE_CHECKING:
    pass

TIGHT = 0.85  # of the memory: more than this may not fit, since a plan can be off by 15 %
# seconds of a step / (its FLOPs / the rate of large products), on a CPU: medians of
# benchmarks/bench_plan.py
SECONDS_FACTOR = {"mlx": 2.5, "torch": 1.5}


# what a run consists of


def micro_batches(
    lengths: np.ndarray, positions: np.ndarray, size: int, multiple: int
) -> Counter[Micro]:
    """The shapes that `data/batches.py` makes, with their counts: rows [S, G] of examples, each
    sorted by length and cut into groups of `size`.

    `lengths` and `positions` are the examples' tokens and loss tokens, int[S, G].
    """
    order = np.argsort(lengths, axis=1, kind="stable")
    lengths, positions = (
        np.take_along_axis(lengths, order, 1),
        np.take_along_axis(positions, order, 1),
    )
    found: Counter[Micro] = Counter()
    for start in range(0, lengths.shape[1], size):
        group = slice(start, start + size)
        together = lengths[:, group].shape[1]
        longest, supervised = lengths[:, group].max(axis=1), positions[:, group].sum(axis=1)
        padded = -(-np.stack([longest, supervised], 1) // multiple) * multiple
        for (length, supervised), count in zip(
            *np.unique(padded, axis=0, return_counts=True), strict=True
        ):
            found[Micro(together, int(length), int(supervised))] += int(count)
    return found


@dataclass(frozen=True)
class _Work:
    """The sequences of a run as numbers."""

    steps: int
    lengths: np.ndarray  # int[S, G]: tokens of each example of each step
    positions: np.ndarray  # int[S, G]: those that carry loss
    training: Counter[Micro]
    validation: Counter[Micro]

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared) -> "_Work":
        table, segments = recipe.batch, recipe.objective.segments
        steps = Steps(
            prepared.train,
            segments,
            table,
            recipe.run.seed,
            recipe.optim.epochs,
            recipe.optim.steps,
        )
        rows = np.array(steps.rows(0, len(steps) * table.global_batch_size)).reshape(len(steps), -1)
        lengths, positions = _sizes(prepared.train, segments)
        shapes = partial(micro_batches, size=table.micro_batch_size, multiple=table.pad_multiple)
        whole, everything = _sizes(sorted(prepared.validation, key=len), ALL_SEGMENTS)
        held_out = shapes(whole[None], everything[None]) if len(whole) else Counter()
        return cls(
            len(steps),
            lengths[rows],
            positions[rows],
            shapes(lengths[rows], positions[rows]),
            held_out,
        )

    def flops(self, count: Callable[[Sequence[int], float], dict[str, float]]) -> dict[str, float]:
        """Operations by part of all steps, and those spent on padding."""
        parts = count(self.lengths.ravel().tolist(), float(self.positions.sum()))
        lengths = [
            micro.length
            for micro, times in self.training.items()
            for _ in range(times * micro.sequences)
        ]
        padded = count(
            lengths, float(sum(times * micro.positions for micro, times in self.training.items()))
        )
        return parts | {"padding": sum(padded.values()) - sum(parts.values())}


def _sizes(
    sequences: Sequence[TokenSequence], segments: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and supervised tokens of each sequence."""
    counts = [(len(sequence), int(sequence.supervised(segments).sum())) for sequence in sequences]
    return tuple(np.array(counts, np.int64).reshape(-1, 2).T)


# the plan


@dataclass(frozen=True)
class Change:
    """A recipe with something else in it: what, the peak it would have, and whether that fits."""

    what: str
    peak_bytes: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run will cost, in numbers."""

    examples: int
    steps: int
    global_batch_size: int
    micro_batch_size: int
    longest: int  # padded tokens of the longest micro-batch
    tokens_before: tuple[int, ...]  # of the training examples, by segment
    tokens_after: tuple[int, ...]
    tokens_read: int  # in all steps
    loss_tokens: int
    flops: dict[
        str, float
    ]  # of all steps: teacher, student, head, loss, and what padding adds to them
    moments: tuple[Moment, ...]
    memory_bytes: int  # what there is; 0 = unknown
    checkpoint_bytes: int
    checkpoints: int  # that lie on disk at once
    student_bytes: int
    cache_bytes: int = 0  # of the teacher cache, at most; 0 where there is none
    changes: tuple[
        Change, ...
    ] = ()  # one at a time, what saves most first; empty where the run fits
    together: tuple[Change, ...] = ()  # the fewest of them that fit together, one after the other
    largest: Change | None = None

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def training_peak(self) -> Moment:
        """Of the steps alone, which is what a run's metrics record."""
        return max(
            (m for m in self.moments if not m.name.startswith("validation")),
            key=lambda moment: moment.total,
        )

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def fits(self) -> bool:
        return not self.memory_bytes or self.peak.total <= self.memory_bytes

    @property
    def disk_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.student_bytes + self.cache_bytes

    def seconds(self, operations_a_second: float, backend: str) -> float:
        """An estimate of the training time, validation aside, from the measured rate of large
        matrix products.
        """
        return SECONDS_FACTOR[backend] * self.total_flops / operations_a_second

    def lines(self) -> list[str]:
        """Two lines: what is to be done, and what it needs."""
        return [
            f"plan: {self.steps:,} steps of {self.global_batch_size} examples, "
            f"{amount(self.tokens_read)} tokens read, {amount(self.loss_tokens)} carry loss, "
            f"{amount(self.total_flops)}FLOP",
            f"plan: {self.verdict()}; disk {amount(self.disk_bytes, 'B')}",
        ]

    def verdict(self) -> str:
        peak = f"peak memory about {amount(self.peak.total, 'B')} ({self.peak.name})"
        if not self.memory_bytes:
            return f"{peak}; how much there is cannot be asked here"
        share = self.peak.total / self.memory_bytes
        answer = "does not fit" if share > 1 else "fits, but tightly" if share > TIGHT else "fits"
        return f"{peak}, {share:.0%} of {amount(self.memory_bytes, 'B')}: {answer}"

    def advice(self) -> list[str]:
        """What to change where it does not fit, what saves most first; nothing where it does."""
        if self.fits:
            return []
        lines = [
            f"{change.what}: saves {amount(self.peak.total - change.peak_bytes, 'B')}, "
            + ("fits" if change.fits else f"still {amount(change.peak_bytes, 'B')}")
            for change in self.changes
        ]
        if len(self.together) > 1:
            names = ", ".join(change.what for change in self.together)
            lines.append(f"together fit: {names} ({amount(self.together[-1].peak_bytes, 'B')})")
        if self.largest:
            lines.append(
                f"the largest that fits: {self.largest.what} "
                f"({amount(self.largest.peak_bytes, 'B')})"
            )
        else:
            lines.append("no smaller micro-batch and no shorter length fits without another change")
        return lines

    def check(self) -> None:
        """Raise `OutOfMemory`, in one line, where the run cannot fit."""
        if not self.fits:
            advice = self.advice()
            chosen = dict.fromkeys([*advice[: len(self.changes)][:1], *advice[len(self.changes) :]])
            raise OutOfMemory(
                f"{self.verdict()}; {'; '.join(chosen)}; `mlx-distill plan` says more, --force "
                "runs all the same"
            )


def make_plan(
    recipe: Recipe,
    prepared: Prepared,
    teacher_config: dict | None,
    student_config: dict,
    machine: Machine,
    advise: bool = True,
) -> Plan:
    """Count and estimate a run. `teacher_config` is None where the recipe names no teacher.

    Raises `ModelError` for a model that is no dense decoder, and what `Steps` raises.
    """
    student = Dense.of(student_config, recipe.student.model)
    teacher = described = (
        Dense.of(teacher_config, recipe.teacher.model) if teacher_config is not None else None
    )
    if recipe.teacher.cache in ("top_k", "sampled"):
        teacher = None  # its answers lie on disk, and none of its weights are loaded
    work, memory = (
        _Work.of(recipe, prepared),
        Memory(recipe, teacher, student, machine, CALIBRATIONS[machine.backend]),
    )
    table, accumulates = (
        recipe.batch,
        recipe.batch.global_batch_size > recipe.batch.micro_batch_size,
    )
    before, after = (
        count_tokens(part, recipe.objective.segments)
        for part in (prepared.train_whole, prepared.train)
    )
    saved = {"float32": 4, "bfloat16": 2, "base": DTYPE_BYTES.get(student.stored, 4)}[
        recipe.student.save_dtype
    ]
    trainable, adapters = memory.trainable(), Adapters.of(recipe.student, student.shape)
    plan = Plan(
        examples=len(prepared.train),
        steps=work.steps,
        global_batch_size=table.global_batch_size,
        micro_batch_size=table.micro_batch_size,
        longest=max(micro.length for micro in work.training),
        tokens_before=tuple(map(int, before.tokens)),
        tokens_after=tuple(map(int, after.tokens)),
        tokens_read=int(work.lengths.sum()),
        loss_tokens=int(work.positions.sum()),
        flops=_without_kept(
            recipe.teacher,
            work.flops(
                partial(
                    training_flops,
                    teacher=teacher.shape if memory.teaches else None,
                    student=student.shape,
                    full=memory.full,
                    checkpointing=recipe.student.gradient_checkpointing,
                    adapters=adapters,
                )
            ),
        ),
        moments=tuple(memory.moments(work.training, work.validation, accumulates)),
        memory_bytes=machine.memory_bytes,
        checkpoint_bytes=FLOAT * (trainable + memory.optimizer_numbers()),
        checkpoints=kept_checkpoints(recipe.run, work.steps),
        student_bytes=student.parameters * saved
        + (0 if memory.full else 2 * FLOAT * trainable),  # adapters in two layouts
        cache_bytes=cache_bytes(recipe.teacher, prepared, described, machine) if described else 0,
    )
    if plan.fits or not advise:
        return plan
    again = partial(
        _peak, teacher_config=teacher_config, student_config=student_config, machine=machine
    )
    changes = _changes(recipe, prepared, plan, again, machine)
    together = _together(recipe, prepared, plan, again, changes)
    return replace(
        plan,
        changes=tuple(c for _, c in changes),
        together=together,
        largest=_largest(recipe, prepared, plan, again),
    )


def _without_kept(table: TeacherTable, flops: dict[str, float]) -> dict[str, float]:
    """A teacher's hidden states that are kept cost no pass through its trunk."""
    return {
        part: value for part, value in flops.items() if part != "teacher" or table.cache != "hidden"
    }


def cache_bytes(table: TeacherTable, prepared: Prepared, teacher: Dense, machine: Machine) -> int:
    """Bytes of a teacher cache of whole training and validation sequences, as `targets.py` keeps
    them (`sampled`: at most).
    """
    tokens = sum(map(len, (*prepared.train_whole, *prepared.validation)))
    number = FLOAT if machine.dtype == "float32" else DTYPE_BYTES.get(teacher.stored, 2)
    width, rows = teacher.shape.width, teacher.shape.vocabulary
    each = {
        "off": 0,
        "top_k": 8 + 6 * min(table.cache_top_k, rows),
        "sampled": 14 + 6 * table.cache_samples,
        "hidden": 4 + number * width,
    }
    return tokens * each[table.cache] + (number * width * rows if table.cache == "hidden" else 0)


def kept_checkpoints(table: RunTable, steps: int) -> int:
    """Checkpoints that lie on disk at once: one is written before another is deleted."""
    every = sum(
        steps // cadence for cadence in (table.checkpoint_every, table.validate_every) if cadence
    )
    return {"last": 2, "last_and_best": 3, "all": min(steps, 1 + every)}[table.keep_checkpoints]


# what to change


Again = Callable[[Recipe, Prepared], float]  # the peak of another recipe


def _peak(
    recipe: Recipe,
    prepared: Prepared,
    teacher_config: dict | None,
    student_config: dict,
    machine: Machine,
) -> float:
    return make_plan(
        recipe, prepared, teacher_config, student_config, machine, advise=False
    ).peak.total


def _recut(recipe: Recipe, prepared: Prepared, max_tokens: int) -> tuple[Recipe, Prepared]:
    """The recipe with `max_tokens` and its training sequences cut anew; the same where nothing
    supervised would be left.
    """
    shorter = with_values(recipe, truncation={"max_tokens": max_tokens})
    cut = [cut_sequence(sequence, shorter) for sequence in prepared.train_whole]
    learning = tuple(
        sequence for sequence in cut if sequence.supervised(recipe.objective.segments).any()
    )
    if len(learning) < recipe.batch.global_batch_size:
        return recipe, prepared
    return shorter, replace(prepared, train=learning)


def _changes(
    recipe: Recipe, prepared: Prepared, plan: Plan, again: Again, machine: Machine
) -> list[tuple[Callable, Change]]:
    """Each single change and what it comes to, what saves most first; those that save nothing are
    left out.
    """
    found = []
    for what, change in _candidates(recipe, plan, machine):
        peak = again(*change(recipe, prepared))
        if peak < plan.peak.total:
            found.append((change, Change(what, peak, peak <= plan.memory_bytes)))
    return sorted(found, key=lambda pair: pair[1].peak_bytes)


def _candidates(recipe: Recipe, plan: Plan, machine: Machine) -> Iterator[tuple[str, Callable]]:
    def setting(table: str, **values) -> Callable:
        return lambda recipe, prepared: (with_values(recipe, **{table: values}), prepared)

    student, half, shorter = recipe.student, recipe.batch.micro_batch_size // 2, plan.longest // 2
    # torch has no kernels for it on a CPU
    quantises = machine.backend == "mlx" or machine.device == "cuda"
    if recipe.teacher.model and not recipe.teacher.quantize_bits and quantises:
        yield "teacher.quantize_bits=4", setting("teacher", quantize_bits=4)
    if student.tuning == "full":
        yield 'student.tuning="lora"', setting("student", tuning="lora")
    if not student.gradient_checkpointing:
        yield "student.gradient_checkpointing=true", setting("student", gradient_checkpointing=True)
    if half:
        yield f"batch.micro_batch_size={half}", setting("batch", micro_batch_size=half)
    if shorter:
        yield (
            f"truncation.max_tokens={shorter}",
            lambda recipe, prepared: _recut(recipe, prepared, shorter),
        )
    if student.compute_dtype == "float32" or (
        student.compute_dtype == "auto" and machine.dtype == "float32"
    ):
        slow = " (slow on a CPU)" if machine.device == "cpu" else ""
        yield (
            f'student.compute_dtype="bfloat16"{slow}',
            setting("student", compute_dtype="bfloat16"),
        )


def _together(
    recipe: Recipe,
    prepared: Prepared,
    plan: Plan,
    again: Again,
    changes: list[tuple[Callable, Change]],
) -> tuple[Change, ...]:
    """Changes added one after the other until the run fits; () where all of them do not do."""
    done: list[Change] = []
    for change, named in changes:
        recipe, prepared = change(recipe, prepared)
        peak = again(recipe, prepared)
        done.append(Change(named.what, peak, peak <= plan.memory_bytes))
        if done[-1].fits:
            return tuple(done)
    return ()


def _largest(recipe: Recipe, prepared: Prepared, plan: Plan, again: Again) -> Change | None:
    """The largest micro-batch that fits, or at one sequence the most tokens; None where nothing
    does.
    """

    def batch(size: int) -> Change:
        peak = again(with_values(recipe, batch={"micro_batch_size": size}), prepared)
        return Change(f"batch.micro_batch_size={size}", peak, peak <= plan.memory_bytes)

    def tokens(most: int) -> Change | None:
        alone, cut = _recut(with_values(recipe, batch={"micro_batch_size": 1}), prepared, most)
        if cut is prepared:
            return None
        peak = again(alone, cut)
        return Change(
            f"truncation.max_tokens={most} at batch.micro_batch_size=1",
            peak,
            peak <= plan.memory_bytes,
        )

    return _last_that_fits(batch, recipe.batch.micro_batch_size - 1) or _last_that_fits(
        tokens, plan.longest - 1
    )


def _last_that_fits(change: Callable[[int], Change | None], most: int) -> Change | None:
    """By bisection over 1..most, of which a larger one needs no less; one that leaves nothing to
    learn (None) is too small.
    """
    low, high, found = 1, most, None
    while low <= high:
        middle = (low + high) // 2
        tried = change(middle)
        if tried is not None and not tried.fits:
            high = middle - 1
        else:
            found, low = tried or found, middle + 1
    return found
