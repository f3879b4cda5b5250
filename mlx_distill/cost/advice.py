"""What to change in a recipe whose run does not fit the memory.

In: a recipe with its sequences, and a function that says what any recipe's peak would be. Out:
`Advice`: single changes, the fewest that fit together, and the largest micro-batch or length that
fits. Decided here: which changes are worth a try.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_distill.data.prepare import Prepared, cut_sequence
from mlx_distill.machine import Machine
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.words import amount


@dataclass(frozen=True)
class Change:
    """A recipe with something else in it: what, the peak it would have, and whether that fits."""

    what: str
    peak_bytes: float
    fits: bool


@dataclass(frozen=True)
class Advice:
    """`changes` one at a time, what saves most first; `together` the fewest of them that fit, one
    after the other; `largest` micro-batch, or length at one sequence, that fits by itself.
    """

    changes: tuple[Change, ...]
    together: tuple[Change, ...]
    largest: Change | None

    def lines(self, peak_bytes: float) -> list[str]:
        """One line a change, then what fits."""
        lines = [
            f"{change.what}: saves {amount(peak_bytes - change.peak_bytes, 'B')}, "
            + ("fits" if change.fits else f"still {amount(change.peak_bytes, 'B')}")
            for change in self.changes
        ]
        return [*lines, *self._what_fits()]

    def brief(self, peak_bytes: float) -> str:
        """The change that saves most and what fits, on one line."""
        return "; ".join([*self.lines(peak_bytes)[:1], *self._what_fits()])

    def _what_fits(self) -> list[str]:
        lines = []
        if len(self.together) > 1:
            names = ", ".join(change.what for change in self.together)
            lines.append(f"together fit: {names} ({amount(self.together[-1].peak_bytes, 'B')})")
        if self.largest:
            size = amount(self.largest.peak_bytes, "B")
            return [*lines, f"the largest that fits: {self.largest.what} ({size})"]
        return [*lines, "no smaller micro-batch and no shorter length fits without another change"]


@dataclass(frozen=True)
class Setting:
    """A recipe, its cut sequences, and the memory that it has to fit."""

    recipe: Recipe
    prepared: Prepared
    memory_bytes: float
    peak_of: Callable[[Recipe, Prepared], float]

    def change(self, what: str) -> Change:
        """This setting as a change of another one."""
        peak = self.peak_of(self.recipe, self.prepared)
        return Change(what, peak, peak <= self.memory_bytes)

    def having(self, table: str, **values: Any) -> "Setting":
        return replace(self, recipe=with_values(self.recipe, **{table: values}))

    def cut_to(self, max_tokens: int) -> "Setting":
        """Its training sequences cut anew; the same setting where too few would be left."""
        shorter = with_values(self.recipe, truncation={"max_tokens": max_tokens})
        cut = [cut_sequence(sequence, shorter) for sequence in self.prepared.train_whole]
        segments = self.recipe.objective.segments
        learning = tuple(sequence for sequence in cut if sequence.supervised(segments).any())
        if len(learning) < self.recipe.batch.global_batch_size:
            return self
        return replace(self, recipe=shorter, prepared=replace(self.prepared, train=learning))


Alter = Callable[[Setting], Setting]


def advise(setting: Setting, peak_bytes: float, longest: int, machine: Machine) -> Advice:
    """What to change in a setting of this peak, whose longest micro-batch has so many tokens."""
    tried = [
        (alter, alter(setting).change(what)) for what, alter in _changes(setting, longest, machine)
    ]
    saving = [(alter, change) for alter, change in tried if change.peak_bytes < peak_bytes]
    saving.sort(key=lambda pair: pair[1].peak_bytes)
    changes = tuple(change for _, change in saving)
    return Advice(changes, _together(setting, saving), _largest(setting, longest))


def _changes(setting: Setting, longest: int, machine: Machine) -> Iterator[tuple[str, Alter]]:
    recipe = setting.recipe
    student, half, shorter = recipe.student, recipe.batch.micro_batch_size // 2, longest // 2
    if recipe.teacher.model and not recipe.teacher.quantize_bits:
        yield "teacher.quantize_bits=4", lambda now: now.having("teacher", quantize_bits=4)
    if student.tuning == "full":
        yield 'student.tuning="lora"', lambda now: now.having("student", tuning="lora")
    elif not student.quantize_bits:
        yield "student.quantize_bits=4", lambda now: now.having("student", quantize_bits=4)
    if not student.gradient_checkpointing:
        yield (
            "student.gradient_checkpointing=true",
            lambda now: now.having("student", gradient_checkpointing=True),
        )
    if half:
        yield (
            f"batch.micro_batch_size={half}",
            lambda now: now.having("batch", micro_batch_size=half),
        )
    if shorter:
        yield f"truncation.max_tokens={shorter}", lambda now: now.cut_to(shorter)
    asked = student.compute_dtype
    if (machine.dtype if asked == "auto" else asked) == "float32":
        slow = " (slow on a CPU)" if machine.device == "cpu" else ""
        yield (
            f'student.compute_dtype="bfloat16"{slow}',
            lambda now: now.having("student", compute_dtype="bfloat16"),
        )


def _together(setting: Setting, saving: list[tuple[Alter, Change]]) -> tuple[Change, ...]:
    """Changes added one after the other until the run fits; () where all of them do not do."""
    done: list[Change] = []
    for alter, named in saving:
        setting = alter(setting)
        done.append(setting.change(named.what))
        if done[-1].fits:
            return tuple(done)
    return ()


def _largest(setting: Setting, longest: int) -> Change | None:
    """The largest micro-batch that fits, or at one sequence the most tokens; None where nothing
    does.
    """

    def batch(size: int) -> Change:
        smaller = setting.having("batch", micro_batch_size=size)
        return smaller.change(f"batch.micro_batch_size={size}")

    def tokens(most: int) -> Change | None:
        alone = setting.having("batch", micro_batch_size=1)
        cut = alone.cut_to(most)
        if cut is alone:
            return None
        return cut.change(f"truncation.max_tokens={most} at batch.micro_batch_size=1")

    smaller = setting.recipe.batch.micro_batch_size - 1
    return _last_that_fits(batch, smaller) or _last_that_fits(tokens, longest - 1)


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
