"""What a run will cost before it starts: tokens, steps, FLOPs, peak memory, disk, and whether it
fits.

In: a recipe, its prepared sequences and the two models' config.json. Out: a `Plan` of plain
numbers, and its lines. Needs no weights and imports no framework. Decided here: what counts as
fitting, and that a measured peak stands above the estimate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlx_distill.cost.advice import Advice, Setting, advise
from mlx_distill.cost.dense import DTYPE_BYTES, FLOAT, Dense
from mlx_distill.cost.flops import matching_flops, selection_flops, training_flops
from mlx_distill.cost.kept_answers import kept_answers
from mlx_distill.cost.memory import Memory, Micro, Moment
from mlx_distill.cost.work import Work
from mlx_distill.data.counts import count_tokens
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import OutOfMemory
from mlx_distill.machine import Machine
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import TeacherTable
from mlx_distill.recipe.training_tables import RunTable
from mlx_distill.words import amount

TIGHT = 0.85  # of the memory: more than this may not fit, since an estimate can be off by 15 %
# seconds of a step / (its FLOPs / the rate of large products), on a CPU: medians of the rows of
# benchmarks/results/bench_plan.csv
SECONDS_FACTOR = {"mlx": 2.5, "torch": 1.5}
ESTIMATED = "estimated from the configs; not measured on this device"
MEASURED = "measured by one step"


@dataclass(frozen=True)
class Measured:
    """Peaks of one step and of one batch of validation (0: there is none), less what the process
    held before it loaded a model.
    """

    training_bytes: float
    validation_bytes: float

    @property
    def peak_bytes(self) -> float:
        return max(self.training_bytes, self.validation_bytes)


@dataclass(frozen=True)
class Costliest:
    """The micro-batches that need the most memory; `accumulates`: a step has several."""

    training: Micro
    validation: Micro | None
    accumulates: bool


@dataclass(frozen=True)
class Plan:
    """What a run will cost, in numbers."""

    work: Work
    global_batch_size: int
    micro_batch_size: int
    examples: int
    tokens_before: tuple[int, ...]  # of the training examples, by segment
    tokens_after: tuple[int, ...]
    # of all steps: teacher, student, head, loss, and what padding adds to them
    flops: dict[str, float]
    moments: tuple[Moment, ...]
    costliest: Costliest
    memory_bytes: int  # what there is; 0 = unknown
    checkpoint_bytes: int
    checkpoints: int  # that lie on disk at once
    student_bytes: int
    cache_bytes: int = 0  # of the teacher cache, at most; 0 where there is none
    kept_bytes: int = 0  # of a live teacher's answers, in memory
    measured: Measured | None = None
    advice: Advice | None = None  # None where the run fits

    @property
    def peak(self) -> Moment:
        """The estimate."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def training_peak(self) -> Moment:
        """Of the steps alone, which is what a run's metrics record."""
        trains = [moment for moment in self.moments if moment.trains]
        return max(trains, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> float:
        """Measured where it was, else the estimate; writing is never measured."""
        if not self.measured:
            return self.peak.total
        writing = (moment.total for moment in self.moments if moment.name == "writing")
        return max(self.measured.peak_bytes, *writing, 0.0)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def fits(self) -> bool:
        """A step that ran fits, whatever the device says that it has."""
        ran = self.measured is not None and self.peak_bytes == self.measured.peak_bytes
        return ran or self.share <= 1

    @property
    def share(self) -> float:
        """Of the memory; 0 where that is unknown."""
        return self.peak_bytes / self.memory_bytes if self.memory_bytes else 0.0

    @property
    def disk_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.student_bytes + self.cache_bytes

    @property
    def micro_batches(self) -> int:
        """In all steps."""
        return self.work.training.total()

    def with_measured(self, measured: Measured | None) -> "Plan":
        """This plan with a measured peak, where there is one."""
        return replace(self, measured=measured, advice=None) if measured else self

    def seconds(self, operations_a_second: float, backend: str) -> float:
        """An estimate of the training time, validation aside, from the measured rate of large
        matrix products.
        """
        return SECONDS_FACTOR[backend] * self.total_flops / operations_a_second

    def lines(self) -> list[str]:
        """Two lines: what is to be done, and what it needs."""
        return [
            f"plan: {self.work.steps:,} steps of {self.global_batch_size} examples, "
            f"{amount(self.work.tokens_read)} tokens read, {amount(self.work.loss_tokens)} carry "
            f"loss, {amount(self.total_flops)}FLOP",
            f"plan: {self.verdict()}; disk {amount(self.disk_bytes, 'B')}",
        ]

    def verdict(self) -> str:
        about = "" if self.measured else "about "
        how = MEASURED if self.measured else ESTIMATED
        if self.measured and self.peak_bytes > self.measured.peak_bytes:
            how = "of writing texts, estimated; a step was measured"
        peak = f"peak memory {about}{amount(self.peak_bytes, 'B')} ({how})"
        if not self.memory_bytes:
            return f"{peak}; how much there is cannot be asked here"
        if self.share > 1:
            answer = "a step ran all the same" if self.fits else "does not fit"
        else:
            answer = "fits, but tightly" if self.share > TIGHT else "fits"
        return f"{peak}, {self.share:.0%} of {amount(self.memory_bytes, 'B')}: {answer}"

    def advice_lines(self) -> list[str]:
        """What to change where it does not fit, what saves most first; nothing where it does."""
        return self.advice.lines(self.peak_bytes) if self.advice else []

    def check(self) -> None:
        """Raise `OutOfMemory`, in one line, where the run cannot fit."""
        if not self.fits:
            change = f"; {self.advice.brief(self.peak_bytes)}" if self.advice else ""
            raise OutOfMemory(
                f"{self.verdict()}{change}; `mlx-distill plan` says more, --force runs all the same"
            )


def make_plan(
    recipe: Recipe,
    prepared: Prepared,
    teacher_config: dict | None,
    student_config: dict,
    machine: Machine,
    advised: bool = True,
) -> Plan:
    """Count and estimate a run. `teacher_config` is None where the recipe names no teacher.

    Raises `ModelError` for a model that is no dense decoder, and what `Steps` raises.
    """
    student = Dense.of(student_config, recipe.student.model)
    described = Dense.of(teacher_config, recipe.teacher.model) if teacher_config else None
    # answers that lie on disk load no teacher
    teacher = None if recipe.teacher.cache in ("top_k", "sampled") else described
    kept = kept_answers(recipe, prepared, teacher, machine)
    memory = Memory(recipe, teacher, student, machine, kept.bytes)
    work = Work.of(recipe, prepared)
    accumulates = recipe.batch.global_batch_size > recipe.batch.micro_batch_size
    before, after = (
        count_tokens(part, recipe.objective.segments)
        for part in (prepared.train_whole, prepared.train)
    )
    plan = Plan(
        work=work,
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        examples=len(prepared.train),
        tokens_before=tuple(map(int, before.tokens)),
        tokens_after=tuple(map(int, after.tokens)),
        flops=_flops(recipe, work, memory, prepared.train if kept.training else ()),
        moments=(
            *memory.moments(work.training, work.validation, accumulates),
            *_writing(recipe, prepared, replace(memory, teacher=described)),
        ),
        costliest=Costliest(
            memory.costliest(work.training),
            max(work.validation, key=lambda micro: micro.tokens, default=None),
            accumulates,
        ),
        memory_bytes=machine.memory_bytes,
        checkpoint_bytes=FLOAT * memory.checkpoint_numbers(),
        checkpoints=kept_checkpoints(recipe.run, work.steps),
        student_bytes=_exported_bytes(recipe, memory),
        cache_bytes=cache_bytes(recipe.teacher, prepared, described, machine) if described else 0,
        kept_bytes=kept.bytes,
    )
    if plan.fits or not advised:
        return plan

    def peak_of(other: Recipe, sequences: Prepared) -> float:
        configs = teacher_config, student_config
        return make_plan(other, sequences, *configs, machine, advised=False).peak.total

    setting = Setting(recipe, prepared, machine.memory_bytes, peak_of)
    return replace(plan, advice=advise(setting, plan.peak.total, work.longest, machine))


def _writing(recipe: Recipe, prepared: Prepared, memory: Memory) -> Iterator[Moment]:
    """Where texts are not written yet; `memory` has the teacher that may write them."""
    writer = memory.teacher if recipe.rollouts.by == "teacher" else memory.student
    if prepared.to_write and writer:
        yield memory.writing(prepared.to_write, writer)


def _flops(
    recipe: Recipe, work: Work, memory: Memory, once: Sequence[TokenSequence]
) -> dict[str, float]:
    """By part; a teacher's hidden states that are kept cost no pass through its trunk, or `once` one
    for each sequence.
    """
    parts = work.flops(
        partial(
            training_flops,
            teacher=memory.asked.shape if memory.asked else None,
            student=memory.student.shape,
            full=memory.full,
            checkpointing=recipe.student.gradient_checkpointing,
            adapters=memory.adapters,
        )
    )
    if recipe.teacher.cache == "hidden":
        parts.pop("teacher", None)
    elif once and memory.asked:
        parts["teacher"] = memory.asked.shape.trunk([len(sequence) for sequence in once])
    teacher = memory.asked.shape if memory.asked else None
    lengths, asked = work.lengths.ravel().tolist(), float(work.asked.sum())
    chosen_by = recipe.selection, teacher, memory.student.shape
    taught, matched = (
        float(work.positions.sum() - work.endings.sum()),
        recipe.objective.matched_layers,
    )
    parts |= matching_flops(taught, matched, teacher, memory.student.shape)
    return parts | selection_flops(lengths, asked, *chosen_by)


def _exported_bytes(recipe: Recipe, memory: Memory) -> int:
    """The exported student; adapters lie beside it in two layouts."""
    stored = DTYPE_BYTES.get(memory.student.stored, 4)
    number = {"float32": 4, "bfloat16": 2, "base": stored}[recipe.student.save_dtype]
    adapters = 0 if memory.full else 2 * FLOAT * memory.trainable()
    return memory.student.parameters * number + adapters


def cache_bytes(table: TeacherTable, prepared: Prepared, teacher: Dense, machine: Machine) -> int:
    """Bytes of a teacher cache of whole training and validation sequences, as `teaching/` keeps
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
    cadences = [table.checkpoint_every, table.validate_every]
    every = sum(steps // cadence for cadence in cadences if cadence)
    return {"last": 2, "last_and_best": 3, "all": min(steps, 1 + every)}[table.keep_checkpoints]
