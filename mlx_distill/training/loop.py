"""The training loop: steps, validation, when to save, how to stop and start again.

In: a student, a teacher (or none), a source of steps, validation batches, a run folder. Out: the run
folder's logs and checkpoints. Everything random was decided before: a step is a function of its
number, so a resumed run repeats the run it continues.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError

from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import Backend, Student, Targets, Teacher
from mlx_distill.data.batches import Batch, Step, share_of
from mlx_distill.data.narrowing import narrowed
from mlx_distill.data.selection import is_scored
from mlx_distill.data.sequences import Segment
from mlx_distill.errors import DistillError, DivergedError, RunError
from mlx_distill.files import one_line
from mlx_distill.objective import Objective
from mlx_distill.pruning.thinning import Thinning
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.rows import MetricsRow, ValidationRow
from mlx_distill.runs.run_folder import RunFolder, TrainState
from mlx_distill.training.schedule import learning_rate
from mlx_distill.view import View

# the divergence of held-out tokens is forward KL at temperature 1, whatever the recipe trains with
HELD_OUT_NAMES = {"kd": "kl"}


class Interrupted(Exception):
    """Ctrl-C was pressed; the run was saved at a step."""


class Source(Protocol):
    """Where the steps of a run come from. A step is the same whenever it is asked for: a run that is
    continued repeats the one that was stopped.
    """

    def __len__(self) -> int: ...

    def step(self, index: int) -> Step:
        """Step `index`, counted from 0; every rank gets all of its batches."""


@dataclasses.dataclass
class Training:
    """Everything one run trains with. `stop_asked` is polled between steps (Ctrl-C)."""

    recipe: Recipe
    backend: Backend
    student: Student
    teacher: Teacher | None
    source: Source
    validation: Sequence[Batch]
    run: RunFolder
    view: View
    flops: Callable[[Step], dict[str, float]]
    inputs_digest: str = ""
    stop_asked: Callable[[], bool] = lambda: False
    thinning: Thinning | None = None

    def __post_init__(self) -> None:
        self.objective = Objective.from_table(self.recipe.objective)
        # one yardstick for every recipe: forward KL at temperature 1, weighed as the recipe weighs
        # its divergence
        self.yardstick = Objective(kd_weight=self.objective.kd_weight)
        self.first_step = True  # of this process: it compiles, which tells nothing of the rate
        self.state = TrainState(
            recipe_digest=self.recipe.digest(), inputs_digest=self.inputs_digest, flops={}
        )

    def train(self) -> TrainState:
        """Train from the newest checkpoint to the last step; raises `DivergedError`, `RunError` or
        `Interrupted`.
        """
        self._resume()
        self.view.start(len(self.source), self.state.step)
        while self.state.step < len(self.source) and not self._out_of_patience():
            began = time.perf_counter()
            if self.thinning:
                self.thinning.cut(self.student, self.state.step, self.view.say)
            step = self.source.step(self.state.step)
            self._step(step, time.perf_counter() - began)
            done = self.state.step == len(self.source)
            improved = self._due(self.recipe.run.validate_every, done) and self._validate()
            stop = self._any(self.stop_asked())
            done = done or self._out_of_patience()
            if improved or stop or self._due(self.recipe.run.checkpoint_every, done):
                self._save()
            if stop:
                raise Interrupted(f"saved at step {self.state.step} in {self.run.path}")
        if self.state.step < len(self.source):
            self.view.say(
                f"training ends after step {self.state.step} of {len(self.source)}: validation was "
                f"best after step {self.state.best_step} (optim.patience = "
                f"{self.recipe.optim.patience})"
            )
        return self.state

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` validations were no better than the best one before them. A
        function of the state, so that a run that is continued ends where it would have.
        """
        patience, every = self.recipe.optim.patience, self.recipe.run.validate_every
        if not patience or self.state.best_step < 0:
            return False
        return self.state.step - self.state.best_step >= patience * every

    def _resume(self) -> None:
        last = self._newest()
        if last.step:
            self._restore(last)
        self._any(False)  # every rank has read it; only then is anything removed
        self.run.tidy(last, self.recipe.run.keep_checkpoints)
        begun = not last.step and any(row.step for row in self.run.rows(MetricsRow))
        self.run.cut_logs(last.step or -1, self.view.say)
        if last.step:
            self.view.say(f"continuing after step {self.state.step}, the newest checkpoint")
        else:
            if begun:
                self.view.say(
                    "note: there is no checkpoint: training begins again at its first step"
                )
            self._validate()

    def _newest(self) -> TrainState:
        """The first rank looks for the newest checkpoint that is whole; the others take that one."""
        found = self.run.last_state(self.recipe.run.export == "best", self.view.say)
        step = self.backend.all_sum(np.array([float(found.step)]))[0]
        return self.run.state_at(int(step))

    def _restore(self, last: TrainState) -> None:
        folder = self.run.checkpoint(last.step)
        if last.recipe_digest != self.state.recipe_digest:
            raise RunError(f"{folder} was written for another recipe; start over with --fresh")
        if last.step > len(self.source):
            raise RunError(
                f"{folder} is of a longer run than this one of {len(self.source)} steps; start "
                "over with --fresh"
            )
        restore(self.student, folder)
        self.state = last

    def _step(self, step: Step, source_seconds: float) -> None:
        started = time.perf_counter()
        self.backend.reset_peak_memory()
        sums = self._accumulate(step)
        rate = learning_rate(step.index, len(self.source), self.recipe.optim)
        norm = self.student.apply(rate)
        if not math.isfinite(norm):
            raise self._diverged(
                step.index,
                "the gradient norm",
                norm,
                [i for batch in step.batches for i in batch.ids],
            )
        seconds = time.perf_counter() - started
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            tokens_seen=self.state.tokens_seen + step.tokens,
            loss_tokens_seen=self.state.loss_tokens_seen + step.positions,
            elapsed_seconds=self.state.elapsed_seconds + source_seconds + seconds,
            flops=_added(self.state.flops, flops := self.flops(step)),
        )
        self._log(step, sums, rate, norm, seconds, source_seconds, flops)

    def _accumulate(self, step: Step) -> LossSums:
        """The sums over all micro-batches of the step, this rank's and the others'."""
        parts, broken = [], []
        for whole in self._mine(step.batches):
            asked = self.teacher if self.objective.needs_teacher else None
            batch, targets = self._chosen(whole, asked.targets(whole) if asked else None)
            parts.append(self.student.accumulate(batch, targets, self.objective, step.loss_tokens))
            if not math.isfinite(value := self._total(parts[-1])):
                broken.append((value, batch.ids))
        sums = self._over_all_ranks(parts)
        if not math.isfinite(value := self._total(sums)):
            value, ids = broken[0] if broken else (value, ["of another rank"])
            raise self._diverged(step.index, "the loss", value, ids)
        return sums

    def _chosen(self, batch: Batch, targets: Targets | None) -> tuple[Batch, Targets | None]:
        """The positions that carry loss, with the teacher's answers to them: all of them, unless the
        models are asked which.
        """
        table = self.recipe.selection
        if not is_scored(table):
            return batch, targets
        if targets is None and table.by == "teacher_entropy":  # nothing that it is asked about
            scores = np.zeros(0, np.float32)
        else:
            scores = self.student.token_scores(batch, targets, self.objective, table.by)
        left, places = narrowed(batch, scores, table, self.recipe.batch.pad_multiple)
        return left, None if targets is None else self.student.targets_at(targets, places)

    def _total(self, sums: LossSums) -> float:
        return self.objective.total({name: float(term.sum()) for name, term in sums.terms.items()})

    def _mine(self, batches: Sequence[Batch]) -> list[Batch]:
        return share_of(batches, self.backend.ranks.rank, self.backend.ranks.size)

    def _over_all_ranks(self, parts: Iterable[LossSums]) -> LossSums:
        return reduce(add, parts).over_ranks(self.backend.all_sum)

    def _any(self, asked: bool) -> bool:
        """Whether any rank says so; all wait for the answer."""
        return bool(self.backend.all_sum(np.array([1.0 if asked else 0.0]))[0])

    def _diverged(self, index: int, what: str, value: float, ids: Sequence[str]) -> DivergedError:
        return DivergedError(
            f"step {index + 1}: {what} is {value} on examples {', '.join(ids)}; the weights were "
            f"not touched and {self.run.what_is_saved()}; look at these examples, or lower "
            "optim.learning_rate"
        )

    def _diverged_in_validation(self, value: float) -> DivergedError:
        advice = (
            "lower optim.learning_rate"
            if self.state.step
            else "the student's or the teacher's own weights do that: name others"
        )
        return DivergedError(
            f"validation after step {self.state.step}: the loss is {value}; "
            f"{self.run.what_is_saved()}; {advice}"
        )

    def _log(
        self,
        step: Step,
        sums: LossSums,
        rate: float,
        norm: float,
        seconds: float,
        source_seconds: float,
        flops: dict[str, float],
    ) -> None:
        terms: dict[str, Any] = loss_terms(sums, self.objective)
        row = MetricsRow(
            step=self.state.step,
            **terms,
            grad_norm=norm,
            learning_rate=rate,
            tokens=step.tokens,
            tokens_seen=self.state.tokens_seen,
            loss_tokens=step.positions,
            seconds=seconds,
            source_seconds=source_seconds,
            tokens_per_second=None if self.first_step else step.tokens / seconds,
            flops=flops,
            **dataclasses.asdict(self.backend.memory()),
        )
        self.first_step = False
        self.run.append(row)
        self.view.step(row.step, row.numbers, self.objective.weights_of(sums.terms))

    def _validate(self) -> bool:
        """Score the whole held-out sequences; True if the loss of the supervised segments is the
        lowest so far.
        """
        started = time.perf_counter()
        sums = self._over_all_ranks(map(self._score, self._mine(self.validation)))
        supervised = [Segment[name.upper()] for name in self.recipe.objective.segments]
        terms = validation_terms(sums, self.yardstick, supervised, self.teacher is not None)
        seconds = time.perf_counter() - started
        self.run.append(ValidationRow(step=self.state.step, **terms, seconds=seconds))
        self.view.validation(self.state.step, terms)
        loss = terms["loss"]
        if not math.isfinite(loss):
            raise self._diverged_in_validation(loss)
        self.state = dataclasses.replace(
            self.state, elapsed_seconds=self.state.elapsed_seconds + time.perf_counter() - started
        )
        if self.state.step == 0 or loss >= self.state.best_loss:
            return False
        if self.thinning and self.state.step <= self.thinning.last:
            return False  # more of it goes
        self.state = dataclasses.replace(self.state, best_step=self.state.step, best_loss=loss)
        return True

    def _score(self, batch: Batch) -> LossSums:
        return self.student.score(
            batch, self.teacher.targets(batch) if self.teacher else None, self.yardstick
        )

    def _due(self, every: int, done: bool) -> bool:
        return done or bool(every and self.state.step % every == 0)

    def _save(self) -> None:
        self.run.save_checkpoint(
            self.state, self.student.save_state, self.recipe.run.keep_checkpoints
        )


def restore(student: Student, folder: Path, optimizer: bool = True) -> None:
    """Load a checkpoint into a student; raises `RunError` where that fails, but `OutOfMemory` where
    there is no room for it.

    Its files were found to be as they were saved, so that this says nothing of them.
    """
    try:
        student.restore_state(folder, optimizer)
    except DistillError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(
            f"{folder} cannot be loaded ({one_line(error)}): put a copy in its place, or start over with "
            "--fresh"
        ) from error


def _added(totals: dict[str, float] | None, flops: dict[str, float]) -> dict[str, float] | None:
    """Sums by part; None, as in checkpoints of older versions, stays None."""
    if totals is None:
        return None
    return totals | {part: totals.get(part, 0.0) + value for part, value in flops.items()}


def loss_terms(sums: LossSums, objective: Objective) -> dict[str, float]:
    """Means over loss tokens: `loss`, and its terms as a whole and by segment (`kd`, `kd_cot`, …)."""
    terms = {name: sums.terms[name] for name in objective.weights_of(sums.terms)}
    loss = {name: values.sum() / sums.loss_tokens for name, values in terms.items()}
    row = {"loss": objective.total(loss), **_means(terms, sums)}
    return {name: float(value) for name, value in row.items()}


def validation_terms(
    sums: LossSums, objective: Objective, supervised: list[Segment], teacher: bool
) -> dict[str, float]:
    """Means over whole held-out sequences: all terms as a whole and by segment, beside `tokens_` of
    each; `loss` over the supervised segments alone.
    """
    chosen = np.array(supervised)
    loss = {
        name: values[chosen].sum() / sums.tokens[chosen].sum()
        for name, values in sums.terms.items()
    }
    terms = {
        HELD_OUT_NAMES.get(name, name): values
        for name, values in sums.terms.items()
        if teacher or name in objective.weights
    }
    counts = {f"tokens_{s.name.lower()}": sums.tokens[s] for s in Segment if sums.tokens[s]}
    row = {"loss": objective.total(loss), **_means(terms, sums), **counts}
    return {name: float(value) for name, value in row.items()}


def _means(terms: dict[str, np.ndarray], sums: LossSums) -> dict[str, float]:
    """Each term's mean, by its name, then those of the segments (`name_segment`), where a term has
    tokens.
    """
    tokens = {name: sums.tokens_of(name) for name in terms}
    means = {
        name: values.sum() / tokens[name].sum()
        for name, values in terms.items()
        if tokens[name].sum()
    }
    by_segment = {
        f"{name}_{segment.name.lower()}": values[segment] / tokens[name][segment]
        for segment in Segment
        for name, values in terms.items()
        if tokens[name][segment]
    }
    return means | by_segment
