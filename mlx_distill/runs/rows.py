"""The rows of a run's two logs, a JSON object a line: one for each step, one for each validation.

In: what the loop measured, or a line. Out: a row. Decided here: which numbers every row has; all
others are the terms of the loss, by name, whatever they are called.
"""

from functools import cached_property
from typing import ClassVar

from pydantic import Field

from mlx_distill.runs.record import Count, Measured, Number, Record
from mlx_distill.words import is_number


class Row(Record):
    """A line of a log."""

    step: Count

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every number of the row by its name, the terms of the loss among them."""
        return {name: float(value) for name, value in self.content().items() if is_number(value)}

    @classmethod
    def expected(cls, step: int) -> set[int]:
        """Which rows a run that stands at `step` has, whatever its recipe; -1: none yet."""
        raise NotImplementedError


class MetricsRow(Row):
    """One optimizer step. tokens, loss_tokens: of this step; tokens_seen: of all so far.
    source_seconds: what making it took before, the student's writing included. flops: its
    operations by part. The sizes are the framework's own counters.
    """

    FILE: ClassVar[str] = "metrics.jsonl"

    loss: Measured = None
    grad_norm: Measured = None
    learning_rate: Measured = None
    tokens: Count = 0
    tokens_seen: Count = 0
    loss_tokens: Count = 0
    seconds: Number = 0.0
    source_seconds: Number = 0.0
    tokens_per_second: Measured = None
    flops: dict[str, Number] = Field(default_factory=dict)
    active_bytes: Count = 0
    cache_bytes: Count = 0
    peak_bytes: Count = 0
    footprint_bytes: Count = 0

    @classmethod
    def expected(cls, step: int) -> set[int]:
        return set(range(1, step + 1))


class ValidationRow(Row):
    """The held-out sequences, whole, after a step; 0 is before the first."""

    FILE: ClassVar[str] = "validation.jsonl"

    loss: Measured = None
    seconds: Number = 0.0

    @classmethod
    def expected(cls, step: int) -> set[int]:
        return {0} if step >= 0 else set()


LOGS = (MetricsRow, ValidationRow)
